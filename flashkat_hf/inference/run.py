"""A model run over pictures by any number of processes: one row for each picture, whatever happens."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.hub_datasets import DatasetStream
from ..data.samples import Transform
from ..data.workers import make_loader
from ..messages import extra
from ..training.progress import progress_bar
from .parts import Parts
from .pictures import Pictures, Reader

if TYPE_CHECKING:
    from accelerate import Accelerator

Columns = Callable[[Tensor], dict[str, Any]]  # pixel values on the device to arrays of pyarrow, by column


def run(
    output: Path,
    pictures: Pictures,
    transform: Transform,
    columns: Columns,
    types: dict[str, Any],
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
    with any number of processes.

    Args:
        output: Parquet file to make.
        pictures: what is asked about.
        transform: from a picture to pixel values.
        columns: from pixel values to columns.
        types: pyarrow types of these columns.
        accelerator: the processes.
        plan: settings on which rows depend.
        batch_size: pictures in a forward pass.
        workers: processes that read, of each process.
        overwrite: replace the file, and begin anew.
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
        Reader(pictures, own, transform, batch_size),
        0 if isinstance(pictures.split, DatasetStream) else min(workers, len(own)),
        getattr(pictures.split, "start_method", None),
        persistent=False,
        batch_size=None,
    )
    shown = progress is not None and accelerator.is_main_process
    total, initial = pictures.num_parts, pictures.num_parts - len(own)
    with progress_bar(total, "part", text=progress or "", initial=initial, shown=shown) as bar:
        for batch in loader if own else ():
            pixels = batch["pixel_values"]
            values = {} if pixels is None else columns(pixels.to(accelerator.device, non_blocking=True))
            parts.add(batch["part"], table(batch, values, types, pictures.class_names), batch["last"])
            if batch["last"]:
                bar.update()
    accelerator.wait_for_everyone()
    return parts.join() if accelerator.is_main_process else None


def table(
    batch: dict[str, Any], values: dict[str, Any], types: dict[str, Any], class_names: list[str] | None
) -> Any:
    """Return the rows of a batch; pictures that could not be read have nulls in the model's columns."""
    pyarrow, errors = extra("pyarrow"), batch["errors"]
    made = iter(range(len(errors)))
    places = pyarrow.array([next(made) if error is None else None for error in errors], pyarrow.int64())
    columns = {"name": pyarrow.array(batch["names"], pyarrow.string())}
    if class_names is not None:
        columns["label"] = pyarrow.array([class_names[i] for i in batch["labels"]], pyarrow.string())
    for name, kind in types.items():
        column = values.get(name)
        nothing = pyarrow.nulls(len(errors), kind)
        columns[name] = nothing if column is None else column.cast(kind).take(places)
    columns["error"] = pyarrow.array(errors, pyarrow.string())
    return pyarrow.table(columns)


def predictions(model: nn.Module, labels: Sequence[str], top_k: int, context: Any) -> tuple[Columns, dict]:
    """Return what makes the columns `labels` and `probabilities`, best first, and their types."""
    pyarrow = extra("pyarrow")
    types = {"labels": pyarrow.list_(pyarrow.string()), "probabilities": pyarrow.list_(pyarrow.float32())}
    names = pyarrow.array(list(labels))

    @torch.no_grad()
    def columns(pixels: Tensor) -> dict[str, Any]:
        with context():
            output = model(pixels)
        logits = getattr(output, "logits", output).float()
        best = logits.softmax(-1).topk(top_k)
        if not best.values.isfinite().all():
            raise ValueError("the model's outputs are not finite")
        ids, chances = best.indices.cpu().flatten().numpy(), best.values.cpu().flatten().numpy()
        offsets = pyarrow.array(range(0, len(ids) + 1, top_k), pyarrow.int32())
        lists = {"labels": names.take(pyarrow.array(ids)), "probabilities": pyarrow.array(chances)}
        return {name: pyarrow.ListArray.from_arrays(offsets, value) for name, value in lists.items()}

    return columns, types


def features(model: Any, patches: bool, context: Any) -> tuple[Columns, dict]:
    """Return what makes the column `pooled`, with `patches` also `patches`, and their types.

    `pooled` is what the classifier sees, `(hidden_size,)`; `patches` the tokens of the grid after the last
    layer, `(rows * columns, hidden_size)`.
    """
    pyarrow, width = extra("pyarrow"), model.config.hidden_size
    embeddings = model.flashkat.embeddings
    number = math.prod(embeddings.grid(*embeddings.image_size))
    vector = pyarrow.list_(pyarrow.float32(), width)
    types = {"pooled": vector} | ({"patches": pyarrow.list_(vector, number)} if patches else {})

    def vectors(values: Tensor) -> Any:
        flat = pyarrow.array(values.float().cpu().flatten().numpy())
        return pyarrow.FixedSizeListArray.from_arrays(flat, width)

    @torch.no_grad()
    def columns(pixels: Tensor) -> dict[str, Any]:
        with context():
            output = model.flashkat(pixels)
        made = {"pooled": vectors(output.pooler_output)}
        if patches:
            grid = vectors(output.last_hidden_state[:, 1:])
            made["patches"] = pyarrow.FixedSizeListArray.from_arrays(grid, number)
        return made

    return columns, types
