"""A film of learned functions: one picture after the other in fixed axes, as an animated GIF."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from ..files import replacing
from .functions import LearnedFunction
from .functions_drawing import View, draw_functions, label_spots
from .functions_inputs import Inputs

NUM_FRAMES = 60  # at most, evenly spread: a picture of 24 panels takes a second
MILLISECONDS, LAST = 150, 2000  # that a picture stands, and the last one


def to_records(functions: Sequence[LearnedFunction]) -> list[dict[str, Any]]:
    """Return functions as JSON takes them; of their inputs only the range is kept."""
    return [
        {
            "module": function.module,
            "group": function.group,
            "name": function.name,
            "init": function.init,
            "coefficients": list(function.coefficients),
            "range": list(function.range),
        }
        for function in functions
    ]


def from_records(records: Sequence[Mapping[str, Any]]) -> list[LearnedFunction]:
    """Return the functions of `to_records`."""
    return [
        LearnedFunction(
            **{name: record[name] for name in ("module", "group", "name", "init")},
            coefficients=tuple(record["coefficients"]),
            inputs=Inputs(numpy.array(record["range"]), numpy.array([0.5, 0.5]), "range"),
        )
        for record in records
    ]


def save_film(path: Path, frames: Sequence[tuple[str, Sequence[LearnedFunction]]]) -> None:
    """Write an animated GIF of a model's functions at several times.

    Args:
        path: of the file; what is there is replaced when the film is complete.
        frames: a title and the functions of each time; at most `NUM_FRAMES` of them are shown, evenly spread.

    Raises:
        ValueError: matplotlib is not installed, or the times have different activations.
        OSError: the file cannot be written.
    """
    count = min(len(frames), NUM_FRAMES)
    shown = [frames[index * (len(frames) - 1) // max(count - 1, 1)] for index in range(count)]
    views = _views([functions for _, functions in shown])
    pictures = []
    for title, functions in shown:
        buffer = io.BytesIO()
        draw_functions(functions, title=title, views=views).savefig(buffer, format="png", dpi=100)
        pictures.append(Image.open(buffer).convert("RGB"))
    palette = pictures[-1].quantize(256)  # one for all: a group keeps its colour
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    times = [MILLISECONDS] * (count - 1) + [LAST]
    with replacing(path, folder=False) as new:
        pictures[0].save(new, format="GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)


def _views(times: Sequence[Sequence[LearnedFunction]]) -> dict[str, View]:
    """Return what each activation's panel shows in every picture: all ranges and values of all times."""
    modules = [(function.module, function.group) for function in times[0]]
    if any([(function.module, function.group) for function in functions] != modules for functions in times):
        raise ValueError("the activations of a film must be the same at all times")
    views = {}
    for module, groups in groupby(times[0], lambda function: function.module):
        count = len(list(groups))
        functions = [function for each in times for function in each if function.module == module]
        low = min(function.range[0] for function in functions)
        high = max(function.range[1] for function in functions)
        x = numpy.linspace(low, high, 400)
        curves = [
            numpy.where((x >= function.range[0]) & (x <= function.range[1]), function(x), numpy.nan)
            for function in functions
        ]
        values = float(numpy.nanmin(curves)), float(numpy.nanmax(curves))
        views[module] = View((low, high), values, label_spots(numpy.stack(curves[-count:])))
    return views
