"""The commands that show what a checkpoint has learned: `plot`, `functions` and `explain`.

Images come from `data/`, which this folder does not import: `cli.py` hands in what opens them.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import replacing, to_json, write_text
from ..messages import one_line
from .explain import explain as draw_explanation
from .functions import model_functions
from .functions_formats import properties, write_functions
from .functions_page import save_functions
from .functions_simplify import Simplification, simplify
from .loading import load_checkpoint


@dataclass(frozen=True)
class Images:
    """Images of one source, as a command needs them.

    Attributes:
        batches: pixel values to measure inputs with.
        tested: batches to test a simplified model with, and their labels where known, made when read.
        about: what `tested` is, in words.
    """

    batches: list[Tensor]
    tested: Iterable[tuple[Tensor, Tensor | None]]
    about: str


@dataclass(frozen=True)
class Opener:
    """The two functions by which a command opens images: many from a source, or one file.

    Attributes:
        folder: of source, model and image processor.
        image: of a file's path and the image processor that it is for.
    """

    folder: Callable[[str, Any, Any], Images]
    image: Callable[[str, Any], Any]


def plot(options: argparse.Namespace, opener: Opener) -> str:
    """Draw the learned functions of a checkpoint, as the options of `flashkat plot` say."""
    output = options.output
    model, processor = load_checkpoint(options.model)
    other = load_checkpoint(options.compare)[0] if options.compare else None
    batches = opener.folder(options.images, model, processor).batches if options.images else None
    wanted = {"layer": options.layer, "group": options.group}
    functions = model_functions(model, batches, **wanted)
    others = None if other is None else model_functions(other, batches, **wanted)
    names = _names(options.model, options.compare)
    save_functions(
        output,
        functions,
        others,
        what=options.what,
        theme=options.theme,
        size=options.size,
        names=names,
        title=names[0] if output.suffix.lower() == ".html" else "",
    )
    return f"{output} written: {len(functions)} functions"


def _names(model: str, other: str | None) -> tuple[str, str]:
    """Return as many last parts of two checkpoints' names as tell them apart."""
    one, two = (Path(name or "").parts for name in (model, other))
    for count in range(1, max(len(one), len(two))):
        if one[-count:] != two[-count:]:
            return "/".join(one[-count:]), "/".join(two[-count:])
    return model, other or ""


def functions(options: argparse.Namespace, opener: Opener) -> str:
    """Write the learned functions as formulas, or replace them by simpler ones."""
    if options.simplify is not None:
        return _simplify(options, opener)
    output = options.output
    model, processor = load_checkpoint(options.model)
    batches = opener.folder(options.images, model, processor).batches if options.images else None
    functions = model_functions(model, batches, layer=options.layer, group=options.group)
    text = write_functions(functions, options.format, options.digits)
    if output is None:
        return text.rstrip("\n")
    try:
        write_text(output, text)
    except OSError as error:
        raise ValueError(f"cannot write {output}: {one_line(error)}") from error
    return f"{output} written: {len(functions)} functions"


def _simplify(options: argparse.Namespace, opener: Opener) -> str:
    output = options.output
    model, processor = load_checkpoint(options.model)
    images = opener.folder(options.images, model, processor)
    result = simplify(model, images.batches, options.simplify)
    tested = compare_models(model, result.model, images.tested)
    try:
        with replacing(output) as folder:
            result.model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
            processor.save_pretrained(folder)
            (folder / "simplification.json").write_text(_record(options, result, tested), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {output}: {one_line(error)}") from error
    return "\n".join([str(result), *_tested_lines(tested, images.about), f"{output} written"])


@torch.no_grad()
def compare_models(
    model: nn.Module, other: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]]
) -> dict[str, Any]:
    """Return on how many images two classifiers agree, and how many each has right where labels are known."""
    counts = {"images": 0, "same": 0, "labelled": 0, "right_before": 0, "right_after": 0}
    model.eval()
    other.eval()
    for pixels, labels in batches:
        one, two = (each(pixels).logits.argmax(-1) for each in (model, other))
        counts["images"] += len(pixels)
        counts["same"] += int((one == two).sum())
        if labels is not None:
            counts["labelled"] += len(labels)
            counts["right_before"] += int((one == labels).sum())
            counts["right_after"] += int((two == labels).sum())
    return counts


def _tested_lines(tested: dict[str, int], about: str) -> list[str]:
    lines = [f"predictions: the same for {tested['same']:,} of {tested['images']:,} images ({about})"]
    if count := tested["labelled"]:
        before, after = tested["right_before"] / count, tested["right_after"] / count
        lines.append(f"accuracy on them: {before:.2%} before, {after:.2%} after ({after - before:+.2%})")
    return lines


def _record(options: argparse.Namespace, result: Simplification, tested: dict[str, int]) -> str:
    choices = [
        {
            "label": choice.before.label,
            "replaced": choice.replaced,
            "error": choice.error,
            "before": properties(choice.before),
            "closest": {"function": choice.after.name, "coefficients": list(choice.after.coefficients)},
        }
        for choice in result.choices
    ]
    return to_json(
        {
            "from": Path(options.model).name,
            "tolerance": result.tolerance,
            "parameters": {"before": result.parameters[0], "after": result.parameters[1]},
            "tested": tested,
            "functions": choices,
        }
    )


def explain(options: argparse.Namespace, opener: Opener) -> str:
    """Draw what a prediction rests on, as the options of `flashkat explain` say."""
    output = options.output
    model, processor = load_checkpoint(options.model)
    image = opener.image(options.image, processor)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    explanation = draw_explanation(model, pixels, options.label)
    figure = explanation.plot(processor.image_mean, processor.image_std)
    try:
        figure.savefig(output, dpi=150)
    except OSError as error:
        raise ValueError(f"cannot write {output}: {one_line(error)}") from error
    return f"{output} written: {explanation.name}, {explanation.probability:.1%}"
