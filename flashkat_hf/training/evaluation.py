"""How good a model is, over any number of processes, exact: every image counts once."""

import math
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from operator import length_hint
from typing import Any, Protocol, cast
from unicodedata import normalize

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn import functional

from ..messages import extra
from .progress import progress_bar


class Stopped(Exception):
    """An evaluation was ended early."""


SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)  # their forward passes wait for each other
STOP = -(2**20)  # a process's vote that outweighs all others


class Scores(Protocol):
    """What adds up how good a model is over the batches of one evaluation, in one of many processes."""

    def add(self, outputs: Any, labels: Tensor) -> None:
        """Count a batch: what the model returned, on the device, and the targets, on the CPU.

        Raises:
            ValueError: the outputs cannot be those of such targets.
        """
        ...

    def result(self) -> dict[str, Any]:
        """Return the scores and "count", the number of images, over all processes, which all ask.

        Raises:
            ValueError: there were no images, or the outputs were not finite.
        """
        ...


class Accuracy:
    """Top-1, top-5 accuracy and mean cross-entropy; the sums of all processes are added once, at the end."""

    def __init__(self, accelerator: Accelerator, outputs: Sequence[int] | None = None):
        """Prepare to count; `outputs` as in `evaluate`."""
        exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
        self.accelerator = accelerator
        self.translate = None if outputs is None else torch.tensor(list(outputs))
        self.sums = torch.zeros(4, dtype=exact, device=accelerator.device)

    def add(self, outputs: Any, labels: Tensor) -> None:
        labels = _class_numbers(labels, self.translate)
        logits = getattr(outputs, "logits", outputs).float()
        low, high = labels.min(), labels.max()  # on the CPU: a GPU would have to be waited for
        if low < 0 or high >= logits.shape[-1]:
            raise ValueError(f"label {low} or {high} has no output of the {logits.shape[-1]}")
        self.sums += _sums(logits, labels.to(logits.device, non_blocking=True)).to(self.sums.dtype)

    def result(self) -> dict[str, Any]:
        total = self.accelerator.reduce(self.sums, "sum")
        assert isinstance(total, Tensor)
        count, top1, top5, loss = total.tolist()
        if not count:
            raise ValueError("there are no images to evaluate")
        if not math.isfinite(loss):
            raise ValueError(
                f"the model's outputs for {int(count)} images are not finite: the loss is {loss}"
            )
        return {"top1": top1 / count, "top5": top5 / count, "loss": loss / count, "count": int(count)}


def evaluate(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    accelerator: Accelerator,
    *,
    outputs: Sequence[int] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return top-1 and top-5 accuracy and mean cross-entropy of a classifier.

    Args:
        model: returns logits `(batch, outputs)` or an object with `logits`; prepared or plain.
        batches: this process's `EvalBatches`; no image may be in the batches of two processes.
        accelerator: the processes.
        outputs: the model's output for each class of the data; default: the one of the same number.
        **options: as `measure` has them.

    Returns:
        `{"top1", "top5", "loss", "count"}`: parts of the images in [0, 1], mean loss, number of images.

    Raises:
        ValueError: there are no images, a label is no number of a class or has no output, or the model's
            outputs are not finite.
        Stopped: as `measure`.
    """
    return measure(model, batches, accelerator, Accuracy(accelerator, outputs), **options)


@torch.no_grad()
def measure(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    accelerator: Accelerator,
    scores: Scores,
    *,
    mixed_precision: bool = False,
    progress: str | None = None,
    keep_progress: bool = True,
    stop: Callable[[], int] | None = None,
) -> dict[str, Any]:
    """Return the result of scores to which each batch of every process was added.

    The model keeps its mode, training or evaluation.

    Args:
        model: takes the images of a batch; prepared or plain.
        batches: this process's `EvalBatches`; no image may be in the batches of two processes.
        accelerator: the processes.
        scores: take what the model returns.
        mixed_precision: compute in accelerate's precision, and compiled where the model is; default: in the
            model's own dtype, as `pipeline` does.
        progress: text of a progress bar on the main process, in a log file of a line a minute; default: none.
        keep_progress: leave the bar on the terminal when it is done.
        stop: is asked every half second; when it is not 0 in any process, all of them end the evaluation.

    Raises:
        ValueError: as the scores.
        Stopped: `stop` said so.
    """
    forward = _forward(model, accelerator, mixed_precision)
    training = model.training
    model.eval()
    try:
        steps = _in_step(_until(stop, batches) if stop else batches, accelerator, stop)
        for batch, counts in _progress(steps, batches, accelerator, progress, keep_progress):
            outputs = forward(batch["pixel_values"].to(accelerator.device, non_blocking=True))
            if counts:
                scores.add(outputs, batch["labels"])
    finally:
        model.train(training)
    if stop:
        vote = accelerator.reduce(torch.tensor([stop()], device=accelerator.device), "sum")
        if cast(Tensor, vote).item():
            raise Stopped
    return scores.result()


def _class_numbers(labels: Tensor, translate: Tensor | None) -> Tensor:
    """Return labels as whole numbers, or the outputs that stand for them; floats and bytes count as numbers.

    Raises:
        ValueError: a label is no whole number, or has no output.
    """
    numbers = labels.long()  # bytes would choose outputs by a mask
    if labels.is_floating_point() and not torch.equal(numbers.to(labels.dtype), labels):
        raise ValueError(f"label {labels[numbers != labels][0].item()} is no number of a class")
    if translate is None or not len(numbers):
        return numbers
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= len(translate):
        raise ValueError(f"label {low} or {high} is none of the {len(translate)} classes")
    return translate[numbers]


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the numbers of images, of hits at first and within five, and the summed cross-entropy."""
    best = logits.topk(min(5, logits.shape[-1])).indices
    hits = best == labels[:, None]
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss.new_tensor(len(labels)), hits[:, 0].sum(), hits.sum(), loss])


def _forward(model: nn.Module, accelerator: Accelerator, mixed_precision: bool) -> Callable[[Tensor], Any]:
    """Return the function from images to outputs, in accelerate's precision or in the model's own."""
    if mixed_precision or accelerator.distributed_type in SHARDED:
        return accelerator.unwrap_model(model)
    # the class's own forward: accelerate wraps the object's in mixed precision
    plain = accelerator.unwrap_model(model, keep_torch_compile=False)
    return partial(type(plain).forward, plain)


def _until(stop: Callable[[], int], batches: Iterable) -> Iterator[dict[str, Tensor]]:
    """Yield the batches until `stop` says so; they are made in a thread, so that it is asked meanwhile."""
    ready: queue.Queue = queue.Queue(1)
    left = threading.Event()

    def put(*item: Any) -> None:
        while not left.is_set():
            with suppress(queue.Full):
                return ready.put(item, timeout=0.5)

    def make() -> None:
        try:
            for batch in batches:
                put(batch, None)
                if left.is_set():
                    return
            put(None, None)
        except BaseException as error:  # the caller's to handle
            put(None, error)

    threading.Thread(target=make, name="evaluation", daemon=True).start()
    try:
        while not stop():
            try:
                batch, error = ready.get(timeout=0.5)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        left.set()


def _in_step(
    batches: Iterable, accelerator: Accelerator, stop: Callable[[], int] | None
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """Yield each batch, and whether it counts; sharded processes make equally many forward passes."""
    if accelerator.distributed_type not in SHARDED:
        yield from ((batch, True) for batch in batches)
        return
    iterator, last = iter(batches), None
    while True:
        batch = next(iterator, None)
        vote = STOP if stop and stop() else int(batch is not None)
        votes = accelerator.reduce(torch.tensor(vote, device=accelerator.device), "sum")
        if cast(Tensor, votes).item() <= 0:
            return
        last = batch or last
        if last is None:
            raise ValueError("a process has no images to evaluate; use fewer processes")
        yield last, batch is not None


def _progress(
    steps: Iterator, batches: Iterable, accelerator: Accelerator, text: str | None, keep: bool
) -> Iterator:
    if text is None or not accelerator.is_main_process:
        yield from steps
        return
    total = length_hint(batches) or None  # a stream does not know it
    with progress_bar(total, "batch", text=text, keep=keep) as bar:
        for step in steps:
            yield step
            bar.update()


def match_classes(class_names: Sequence[str], outputs: Sequence[str]) -> tuple[list[int], str]:
    """Find the output of a model that stands for each class of the data, however Unicode composes the names.

    The rules, in this order: the same names; WordNet ids as class names and a model of ImageNet's classes, by
    timm's table; names that agree but for case, underscores and synonyms ("tench, Tinca tinca" for "tench");
    as many outputs without names ("LABEL_0") as classes, in the data's order. Names that sort otherwise as
    numbers than as texts (folders called 2 and 10) have two orders, so that rule does not hold for them.

    Returns:
        The index of the output for each class, and the rule in words.

    Raises:
        ValueError: no rule gives every class an output of its own.
    """
    class_names, outputs = ([normalize("NFC", name) for name in names] for names in (class_names, outputs))
    if (matched := _by_key(class_names, outputs, str)) is not None:
        return matched, "by name"
    for names, key, rule in (
        (_synsets(class_names, outputs), str, "by WordNet id"),
        (outputs, _plain, "by name, without case and synonyms"),
        (outputs, lambda name: _plain(name).split(", ")[0], "by name, without case and synonyms"),
    ):
        if names and (matched := _by_key(class_names, names, key)) is not None:
            return matched, rule
    if len(outputs) == len(class_names) and all(_nameless(name, index) for index, name in enumerate(outputs)):
        by_number = sorted(class_names, key=_by_number)
        if list(class_names) == sorted(class_names) != by_number:
            raise ValueError(
                f"the model does not name its outputs, and the data's classes have two orders: "
                f"{', '.join(class_names[:3])}, ... as texts, {', '.join(by_number[:3])}, ... as numbers; "
                "name the outputs in config.json (id2label)"
            )
        return list(range(len(outputs))), "in the data's order, since the model does not name its outputs"
    unknown = [name for name in class_names if name not in set(outputs)]
    raise ValueError(
        f"the data's {len(class_names)} classes cannot be matched with the model's {len(outputs)} outputs: "
        f"{len(unknown)} classes are none of them, such as {unknown[0]!r} beside {outputs[0]!r}"
    )


def _by_key(
    class_names: Sequence[str], outputs: Sequence[str], key: Callable[[str], str]
) -> list[int] | None:
    """Return an output's index for each class, if each has exactly one with its key, and no two the same."""
    indices: dict[str, list[int]] = {}
    for index, name in enumerate(outputs):
        indices.setdefault(key(name), []).append(index)
    matched = [indices.get(key(name), []) for name in class_names]
    if all(len(candidates) == 1 for candidates in matched):
        unique = [candidates[0] for candidates in matched]
        return unique if len(set(unique)) == len(unique) else None
    return None


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return the key by which names sort whose numbers count as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _nameless(name: str, index: int) -> bool:
    return name in (f"LABEL_{index}", str(index))


def _synsets(class_names: Sequence[str], outputs: Sequence[str]) -> Sequence[str] | None:
    """Return the outputs' WordNet ids, if classes are named so and outputs are ImageNet's in its order."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in class_names):
        return None
    data = extra("timm.data")
    subset = data.infer_imagenet_subset({"num_classes": len(outputs)})
    if subset is None:
        return None
    info = data.ImageNetInfo(subset)
    for index, name in enumerate(outputs):
        first = _plain(info.index_to_description(index)).split(", ")[0]
        if not _nameless(name, index) and first != _plain(name).split(", ")[0]:
            return None  # named otherwise, or in another order
    return info.label_names()
