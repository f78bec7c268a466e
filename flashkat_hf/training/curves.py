"""The curves of a run as a picture; matplotlib is imported when it is made, and its `pyplot` never."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..messages import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (  # title, and the label of each curve by its name in metrics.jsonl
    ("loss", {"loss": "training"}),
    ("learning rate", {"learning_rate": "learning rate"}),
    ("top-1 accuracy in %", {"top1": "weights", "top1_ema": "averaged weights"}),
)


def plot_curves(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw loss, learning rate and accuracy of a training run over its steps, a panel each.

    A curve that no line has is left out.

    Args:
        metrics: lines of a metrics.jsonl, in any order: "step" and any of "epoch", "loss", "learning_rate",
            "top1" and "top1_ema"; the accuracies as parts of 1. The loss is taken from the lines without
            "top1" if there are any.

    Raises:
        ValueError: matplotlib is not installed, or there is nothing to draw.
    """
    try:
        figure_class = extra("matplotlib.figure").Figure
    except ImportError as error:
        raise ValueError(f"a figure needs matplotlib: {error}") from error
    panels = []
    for title, names in PANELS:
        curves = {label: points for name, label in names.items() if (points := _points(metrics, name))}
        if curves:
            panels.append((title, curves))
    if not panels:
        raise ValueError("no line of the metrics has a step and a loss, a learning rate or an accuracy")
    figure = figure_class(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for panel, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, points in curves.items():
            steps, values = zip(*points, strict=True)
            scale = 100 if "accuracy" in title else 1
            markers = {"marker": ".", "markersize": 4} if len(points) <= 60 else {}
            panel.plot(steps, [scale * value for value in values], label=label, linewidth=1.2, **markers)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
        if len(curves) > 1:
            panel.legend(fontsize=8)
    return figure


def _points(metrics: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return (step, value) of the lines that have both, in order."""
    lines = [line for line in metrics if line.get("step") is not None and line.get(name) is not None]
    if name == "loss" and (training := [line for line in lines if line.get("top1") is None]):
        lines = training
    return sorted((line["step"], line[name]) for line in lines)
