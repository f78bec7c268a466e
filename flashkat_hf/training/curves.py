"""The curves of a run as a picture; matplotlib is imported when it is made, and its `pyplot` never."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..messages import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (  # title, and of each curve label, name in metrics.jsonl, and whether it is of single batches
    ("loss", (("single batches", "loss", True), ("mean of an epoch", "loss", False))),
    ("learning rate", (("learning rate", "learning_rate", None),)),
)


def plot_curves(
    metrics: Sequence[Mapping[str, Any]],
    rates: Sequence[tuple[int, float]] = (),
    score: str = "top1",
    title: str = "top-1 accuracy",
) -> Figure:
    """Draw loss, learning rate and score of a training run over its steps, a panel each.

    A curve that no line has is left out.

    Args:
        metrics: lines of a metrics.jsonl, in any order: "step" and any of "kind", "epoch", "loss",
            "learning_rate", and the score and the same with "_ema", as parts of 1. Lines with the kind "step"
            are of single batches, the others of epochs, whose mean loss is drawn in their middle.
        rates: (step, learning rate) instead of those of the metrics, which are too few to show a warm-up.
        score: the name of the score in the lines.
        title: of its panel.

    Raises:
        ValueError: matplotlib is not installed, or there is nothing to draw.
    """
    try:
        figure_class = extra("matplotlib.figure").Figure
    except ImportError as error:
        raise ValueError(f"a figure needs matplotlib: {error}") from error
    panels = []
    percent, scored = (
        f"{title} in %",
        (("weights", score, False), ("averaged weights", f"{score}_ema", False)),
    )
    for title, names in (*PANELS, (percent, scored)):
        curves = {
            label: points for label, name, single in names if (points := _points(metrics, name, single))
        }
        if title == "learning rate" and rates:
            curves = {title: sorted(rates)}
        if curves:
            panels.append((title, curves))
    if not panels:
        raise ValueError("no line of the metrics has a step and a loss, a learning rate or an accuracy")
    figure = figure_class(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for panel, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, points in curves.items():
            steps, values = zip(*points, strict=True)
            scale = 100 if title == percent else 1
            style: dict[str, Any] = {"marker": ".", "markersize": 4} if len(points) <= 60 else {}
            style |= {"alpha": 0.4, "linewidth": 0.8} if label == "single batches" else {"linewidth": 1.4}
            panel.plot(steps, [scale * value for value in values], label=label, **style)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
        if len(curves) > 1:
            panel.legend(fontsize=8)
    return figure


def _points(
    metrics: Sequence[Mapping[str, Any]], name: str, single: bool | None
) -> list[tuple[float, float]]:
    """Return (step, value) of the lines that have both: of single batches, of epochs, or of both."""
    lines = [line for line in metrics if line.get("step") is not None and line.get(name) is not None]
    points = sorted(
        (line["step"], line[name])
        for line in lines
        if single is None or (line.get("kind") == "step") is single
    )
    if name == "loss" and not single:  # a mean over the steps since the line before
        starts = [0.0, *(step for step, _ in points)]
        points = [((start + step) / 2, loss) for start, (step, loss) in zip(starts, points, strict=False)]
    return points
