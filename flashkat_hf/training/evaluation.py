"""Accuracy of a classifier over any number of processes, exact: every image counts once."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn import functional

from ..messages import extra

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)  # their forward passes wait for each other


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    accelerator: Accelerator,
    *,
    outputs: Sequence[int] | None = None,
    mixed_precision: bool = False,
    progress: str | None = None,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy and mean cross-entropy; the sums of all processes are added once, at the end.

    The model is left as it was, in training or evaluation mode.

    Args:
        model: returns logits `(batch, outputs)`, or an object with `logits`; prepared by `accelerator`, or
            plain.
        batches: this process's `EvalBatches`; no image may be in the batches of two processes.
        accelerator: the processes.
        outputs: for each class of the data, which output of the model stands for it; default: the same
            number.
        mixed_precision: in accelerate's precision, and compiled where the model is; default: in the model's
            own dtype, as `pipeline` computes.
        progress: text of a progress bar on the main process; default: no bar.

    Returns:
        `{"top1", "top5", "loss", "count"}`: parts of the images in [0, 1], mean over the images, number of
        images.

    Raises:
        ValueError: there are no images, or a label has no output.
    """
    run, sharded = _forward(model, accelerator, mixed_precision), accelerator.distributed_type in SHARDED
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
    sums = torch.zeros(4, dtype=exact, device=accelerator.device)
    translate = None if outputs is None else torch.tensor(list(outputs))
    training = model.training
    model.eval()
    try:
        for batch, counts in _progress(
            _in_step(batches, accelerator, sharded), batches, accelerator, progress
        ):
            labels = batch["labels"] if translate is None else translate[batch["labels"]]
            logits = run(batch["pixel_values"].to(accelerator.device, non_blocking=True)).float()
            if (
                labels.min() < 0 or labels.max() >= logits.shape[-1]
            ):  # on the CPU: a GPU would have to be waited for
                raise ValueError(
                    f"label {labels.min()} or {labels.max()} has no output of the {logits.shape[-1]}"
                )
            if counts:
                sums += _sums(logits, labels.to(accelerator.device, non_blocking=True)).to(exact)
    finally:
        model.train(training)
    total = accelerator.reduce(sums, "sum")
    assert isinstance(total, Tensor)
    count, top1, top5, loss = total.tolist()
    if not count:
        raise ValueError("there are no images to evaluate")
    return {"top1": top1 / count, "top5": top5 / count, "loss": loss / count, "count": int(count)}


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Number of images, of those right at first and within five, and the summed cross-entropy."""
    best = logits.topk(min(5, logits.shape[-1])).indices
    hits = best == labels[:, None]
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss.new_tensor(len(labels)), hits[:, 0].sum(), hits.sum(), loss])


def _forward(model: nn.Module, accelerator: Accelerator, mixed_precision: bool):
    if mixed_precision or accelerator.distributed_type in SHARDED:
        return lambda images: _logits(accelerator.unwrap_model(model)(images))
    plain = accelerator.unwrap_model(model, keep_torch_compile=False)
    # the class's own forward: accelerate wraps the object's in mixed precision
    return lambda images: _logits(type(plain).forward(plain, images))


def _logits(output) -> Tensor:
    return getattr(output, "logits", output)


def _in_step(
    batches: Iterable, accelerator: Accelerator, sharded: bool
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """Each batch, and whether it counts.

    Where processes wait for each other, they make equally many forward passes.
    """
    if not sharded:
        yield from ((batch, True) for batch in batches)
        return
    iterator, last = iter(batches), None
    while True:
        batch = next(iterator, None)
        more = accelerator.reduce(torch.tensor(int(batch is not None), device=accelerator.device), "sum")
        if not more:
            return
        last = batch or last
        if last is None:
            raise ValueError("a process has no images to evaluate; use fewer processes")
        yield last, batch is not None


def _progress(steps: Iterator, batches: Iterable, accelerator: Accelerator, text: str | None) -> Iterator:
    if text is None or not accelerator.is_main_process:
        return steps
    try:
        total = len(batches)  # type: ignore[arg-type]
    except TypeError:
        total = None
    return iter(extra("tqdm").tqdm(steps, desc=text, total=total, unit="batch"))


def match_classes(class_names: Sequence[str], outputs: Sequence[str]) -> tuple[list[int], str]:
    """Which output of a model stands for each class of the data.

    Tried in this order: the same names; WordNet ids as class names and a model of ImageNet's classes, by
    timm's table; names that agree but for case, underscores and synonyms ("tench, Tinca tinca" for "tench");
    as many outputs without names ("LABEL_0") as classes, in sorted order.

    Args:
        class_names: of the data.
        outputs: names of the model's outputs, by index.

    Returns:
        The index of the output for each class, and how they were matched, in words.

    Raises:
        ValueError: no rule gives every class an output of its own.
    """
    matched = _by_key(class_names, outputs, [lambda name: [name]])
    if matched is not None:
        return matched, "by name"
    synsets = _synsets(class_names, outputs)
    if synsets and (matched := _by_key(class_names, synsets, [lambda name: [name]])) is not None:
        return matched, "by WordNet id"
    matched = _by_key(
        class_names, outputs, [lambda name: [_plain(name)], lambda name: _plain(name).split(", ")[:1]]
    )
    if matched is not None:
        return matched, "by name, without case and synonyms"
    if len(outputs) == len(class_names) and all(_nameless(name, index) for index, name in enumerate(outputs)):
        return list(range(len(outputs))), "in sorted order, since the model does not name its outputs"
    unknown = [name for name in class_names if name not in set(outputs)]
    raise ValueError(
        f"the data's {len(class_names)} classes cannot be matched with the model's {len(outputs)} outputs: "
        f"{len(unknown)} classes are none of them, such as {unknown[0]!r} beside {outputs[0]!r}"
    )


def _by_key(class_names: Sequence[str], outputs: Sequence[str], keys: list) -> list[int] | None:
    """Indices by the first of the keys under which every class finds exactly one output, and no two the same."""
    for key in keys:
        found: dict[str, list[int]] = {}
        for index, name in enumerate(outputs):
            for word in key(name):
                found.setdefault(word, []).append(index)
        matched = [
            sorted({index for word in key(name) for index in found.get(word, ())}) for name in class_names
        ]
        indices = [candidates[0] for candidates in matched if len(candidates) == 1]
        if len(set(indices)) == len(class_names):
            return indices
    return None


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _nameless(name: str, index: int) -> bool:
    return name in (f"LABEL_{index}", str(index))


def _synsets(class_names: Sequence[str], outputs: Sequence[str]) -> Sequence[str] | None:
    """WordNet ids of the outputs, if classes are named so and the outputs are ImageNet's in its order."""
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
