"""A model run over pictures by any number of processes: one row for each picture, whatever happens."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.hub_datasets import DatasetStream
from ..data.workers import delivered, end_workers, make_loader
from ..messages import extra
from ..training.progress import progress_bar
from .inputs import Inputs
from .parts import Parts
from .pictures import Pictures, Reader
from .questions import Answers, Question

if TYPE_CHECKING:
    from accelerate import Accelerator

BEHIND = 4  # batches whose rows are still to be written, at most


def run(
    output: Path,
    pictures: Pictures,
    inputs: Inputs,
    question: Question,
    accelerator: "Accelerator",
    *,
    plan: dict[str, Any],
    batch_size: int,
    workers: int,
    overwrite: bool,
    progress: str | None,
) -> int | None:
    """Write a row for each picture: its name, its label if it has one, what a model says, or why it does not.

    Memory does not depend on the number of pictures: processes write parts of at most `pictures.PART` rows,
    and one of them joins these at the end. A run that ended early goes on with the parts that are missing,
    with any number of processes. Rows are written in a thread, for which the device does not wait.

    Args:
        output: Parquet file to make.
        pictures: what is asked about.
        inputs: from a picture to pixel values on the device.
        question: from pixel values to columns.
        accelerator: the processes.
        plan: settings on which rows depend.
        batch_size: pictures in a forward pass.
        workers: processes that read, of each process.
        overwrite: replace the file; parts made with other settings are dropped.
        progress: text of the bar; None: no bar.

    Returns:
        The number of rows, in the main process.
    """
    parts = Parts(output, pictures.num_parts)
    if accelerator.is_main_process:
        parts.begin(plan | {"pictures": pictures.fingerprint, "parts": pictures.num_parts}, overwrite)
    accelerator.wait_for_everyone()
    own = parts.missing()[accelerator.process_index :: accelerator.num_processes]
    accelerator.wait_for_everyone()  # no part is made before all have looked which there are
    # datasets would deal out a part to the workers once more
    loader = make_loader(
        Reader(pictures, own, inputs.transform, batch_size),
        0 if isinstance(pictures.split, DatasetStream) else min(workers, len(own)),
        getattr(pictures.split, "start_method", None),
        batch_size=None,
        pin_memory=accelerator.device.type == "cuda",
    )
    shown = progress is not None and accelerator.is_main_process
    total, initial = pictures.num_parts, pictures.num_parts - len(own)

    failed = Event()

    def write(batch: dict[str, Any], pending: Pending | None) -> None:
        if failed.is_set():
            return  # later rows would make a part look whole that misses these
        try:
            values = {} if pending is None else question.columns(pending.answers())
            rows = table(batch, values, question.types, pictures.class_names)
            parts.add(batch["part"], rows, batch["last"])
        except BaseException:
            failed.set()
            raise
        if batch["last"]:
            bar.update()

    bar = progress_bar(total, "part", text=progress or "", initial=initial, shown=shown)
    writer, written = ThreadPoolExecutor(1, "rows"), deque[Future[None]]()
    with bar, writer:
        try:
            with closing(inputs.batches(delivered(loader) if own else ())) as batches:
                for batch, pixels in batches:
                    pending = None if pixels is None else Pending(question.compute(pixels))
                    written.append(writer.submit(write, batch, pending))
                    if len(written) > BEHIND:
                        written.popleft().result()
            while written:
                written.popleft().result()
        finally:
            end_workers(loader)
    accelerator.wait_for_everyone()
    return parts.join() if accelerator.is_main_process else None


class Pending:
    """Answers on their way from a device to the CPU."""

    def __init__(self, answers: Answers):
        self.copies = {name: answer.to("cpu", non_blocking=True) for name, answer in answers.items()}
        self.event: torch.cuda.Event | None = None
        if any(answer.is_cuda for answer in answers.values()):
            self.event = torch.cuda.Event(blocking=True)  # others can use the core of the thread that waits
            self.event.record()

    def answers(self) -> dict[str, Tensor]:
        """Return the answers when they are there."""
        if self.event is not None:
            self.event.synchronize()
        return self.copies


def table(
    batch: dict[str, Any], values: dict[str, Any], types: dict[str, Any], class_names: list[str] | None
) -> Any:
    """Return the rows of a batch; pictures that could not be read have nulls in the model's columns."""
    pyarrow, errors = extra("pyarrow"), batch["errors"]
    made = iter(range(len(errors)))
    places = pyarrow.array([next(made) if error is None else None for error in errors], pyarrow.int64())
    columns = {"name": strings(batch["names"])}
    if class_names is not None:
        columns["label"] = pyarrow.array([class_names[i] for i in batch["labels"]], pyarrow.string())
    for name, kind in types.items():
        column = values.get(name)
        nothing = pyarrow.nulls(len(errors), kind)
        columns[name] = nothing if column is None else column.cast(kind).take(places)
    columns["error"] = strings(errors)
    return pyarrow.table(columns)


def strings(texts: Sequence[str | None]) -> Any:
    """Return an array of pyarrow; what is not UTF-8, as the name of a file may be, is escaped."""
    pyarrow = extra("pyarrow")
    escaped = (text and text.encode("utf-8", "backslashreplace").decode() for text in texts)
    return pyarrow.array(escaped, pyarrow.string())
