"""Pictures of learned functions: a panel for each activation, and a shared legend.

matplotlib is imported when a figure is made, and its `pyplot` never.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy

from .functions import KNOWN, LearnedFunction, What, in_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Literal["light", "dark"]
Size = Literal["screen", "column"]
# Okabe and Ito's colours for the colour-blind, some darker or lighter; in grey the digits on the curves tell.
COLORS = {
    "light": ("#000000", "#E69F00", "#56B4E9", "#009E73", "#B59F00", "#0072B2", "#D55E00", "#CC79A7"),
    "dark": ("#FFFFFF", "#E69F00", "#56B4E9", "#00B987", "#F0E442", "#4A9FE0", "#FF7A2E", "#DE9CC2"),
}
INK = {
    "light": ("#222222", "#ffffff", "#8a8a8a"),
    "dark": ("#dddddd", "#15181c", "#8f8f8f"),
}  # text, page, lines
SETTINGS = {  # columns of panels, inches of a panel, sizes of text and lines
    "screen": {
        "columns": 6,
        "width": 2.2,
        "height": 1.55,
        "text": 8.0,
        "line": 1.2,
        "marker": 4.6,
        "points": 400,
    },
    "column": {
        "columns": 4,
        "width": 0.78,
        "height": 0.76,
        "text": 5.0,
        "line": 0.7,
        "marker": 2.6,
        "points": 200,
    },
}


class View(NamedTuple):
    """The axes of a panel, given by the caller so that all pictures of a film have the same.

    Attributes:
        x: first and last input.
        values: least and largest output.
        spots: index along x of each group's digit, of as many points as a curve has.
    """

    x: tuple[float, float]
    values: tuple[float, float]
    spots: Sequence[int]


def draw_functions(
    functions: Sequence[LearnedFunction],
    others: Sequence[LearnedFunction] | None = None,
    *,
    what: What = "value",
    theme: Theme = "light",
    size: Size = "screen",
    names: tuple[str, str] = ("this model", "the other"),
    title: str = "",
    views: Mapping[str, View] | None = None,
) -> Figure:
    """Draw functions of `model_functions`, as `plot_functions` does.

    Args:
        functions: of one model, at least one.
        others: another model's, to compare.
        what: the functions or their slopes.
        theme: light or dark.
        size: of a screen, or of a column of a paper.
        names: of the two models.
        title: above the picture.
        views: what the panels show, by activation; default: what the functions' inputs take.

    Raises:
        ValueError: matplotlib is not installed, a choice is unknown, or `others` are other activations'.
    """
    figure_of = figure_class("functions")
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    for name, value, choices in (("what", what, What), ("theme", theme, Theme), ("size", size, Size)):
        if value not in get_args(choices):
            raise ValueError(f"{name} must be {' or '.join(get_args(choices))}, not {value!r}")
    other = _beside(functions, others)
    panels = [list(panel) for _, panel in groupby(functions, lambda function: function.module)]
    look = dict(SETTINGS[size])
    rows = _rows(panels, look["columns"])
    columns = max(map(len, rows))
    if columns <= 2:  # few panels are larger
        look |= {"width": 2 * look["width"], "height": 2 * look["height"]}
    ink, page, _ = INK[theme]
    figure = figure_of(
        figsize=(0.35 + look["width"] * columns, look["text"] / 12 + 0.25 + look["height"] * len(rows)),
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01),
        facecolor=page,
    )
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, row_axes in zip(rows, axes, strict=True):
        for index, panel in enumerate(row_axes):
            if index >= len(row):
                panel.set_axis_off()
                continue
            view = (views or {}).get(row[index][0].module)
            _draw_panel(panel, row[index], other, what, theme, look, view)
            _dress(panel, row[index], first=index == 0, theme=theme, look=look)
    handles = _legend(functions, bool(other), what, theme, look, names)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=_columns([handle.get_label() for handle in handles], figure.get_figwidth(), look["text"]),
        fontsize=look["text"],
        labelcolor=ink,
        frameon=False,
        handlelength=2.2,
        columnspacing=1.2,
    )
    if title:
        figure.suptitle(title, fontsize=look["text"] + 1, color=ink)
    return figure


def _beside(
    functions: Sequence[LearnedFunction], others: Sequence[LearnedFunction] | None
) -> dict[tuple[str, int], LearnedFunction]:
    """Return the others by module and group; prefixes such as "flashkat." do not count."""
    if others is None:
        return {}
    key = lambda function: (function.module.removeprefix("flashkat."), function.group)  # noqa: E731
    found = {key(function): function for function in others}
    own = {key(function): function for function in functions}
    for one, two, whose in ((own, found, "the other has no"), (found, own, "only the other has")):
        if alone := [function.label for place, function in one.items() if place not in two]:
            raise ValueError(f"the two models have other activations: {whose} {alone[0]}")
    return {(function.module, function.group): found[key(function)] for function in functions}


def _rows(panels: list[list[LearnedFunction]], columns: int) -> list[list[list[LearnedFunction]]]:
    """Return rows of panels: of act1 and act2 in turn, where all are called so, else in order."""
    kinds = {name: [panel for panel in panels if panel[0].act == name] for name in ("act1", "act2")}
    if sum(map(len, kinds.values())) != len(panels):
        return [panels[start : start + columns] for start in range(0, len(panels), columns)]
    longest = max(map(len, kinds.values()))
    if longest == 1:
        return [panels]
    columns = -(-longest // -(-longest // columns))
    starts = range(0, longest, columns)
    return [kind[start : start + columns] for start in starts for kind in kinds.values() if kind[start:]]


def _draw_panel(
    panel: Axes,
    functions: Sequence[LearnedFunction],
    others: Mapping[tuple[str, int], LearnedFunction],
    what: What,
    theme: Theme,
    look: Mapping[str, Any],
    view: View | None,
) -> None:
    from matplotlib.patheffects import withStroke

    ranges = [view.x] if view else [function.range for function in functions]
    low, high = min(each[0] for each in ranges), max(each[1] for each in ranges)
    x = numpy.linspace(low, high, look["points"])
    _, page, line = INK[theme]
    whole, drawn = [], []
    for function in functions:
        color = COLORS[theme][function.group % len(COLORS[theme])]
        y = _curve(function, what)(x)
        whole.append(y)
        inside = (x >= function.range[0]) & (x <= function.range[1])
        drawn.append(numpy.where(inside, y, numpy.nan))
        panel.plot(x, y, color=color, linewidth=look["line"], alpha=0.3, zorder=3)
        panel.plot(
            x, drawn[-1], color=color, linewidth=look["line"], zorder=4, label=f"group {function.group}"
        )
        if others:
            other = others[function.module, function.group]
            panel.plot(
                x, _curve(other, what)(x), color=color, linewidth=0.75 * look["line"], linestyle="-.",
                zorder=3, label="_other",
            )  # fmt: skip
    values = numpy.stack(drawn)
    least, most = view.values if view else (float(numpy.nanmin(values)), float(numpy.nanmax(values)))
    margin = 0.08 * (most - least) or 0.5
    histograms = 0.25 * (most - least + 2 * margin) if any(f.inputs.counted for f in functions) else 0.0
    bottom = least - margin - histograms
    panel.set_ylim(bottom, most + margin)  # the start may leave the panel
    panel.set_xlim(low, high)
    start = functions[0].start
    panel.plot(
        x, _curve(start, what)(x), color=line, linestyle="--", linewidth=look["line"], label="start", zorder=5
    )
    known = "identity" if start.init == "identity" else "gelu"
    panel.plot(
        x,
        _known_curve(known, what, x),
        color=line,
        linestyle=":",
        linewidth=1.2 * look["line"],
        label=known,
        zorder=5,
    )
    if len(functions) > 1:
        spots = view.spots if view else label_spots(values)
        for function, y, spot in zip(functions, whole, spots, strict=True):
            color = COLORS[theme][function.group % len(COLORS[theme])]
            panel.text(
                x[spot], y[spot], str(function.group), ha="center",
                va="center", fontsize=0.85 * look["text"], color=color, zorder=6,
                path_effects=[withStroke(linewidth=0.28 * look["text"], foreground=page)], clip_on=True,
            ).set_in_layout(False)  # fmt: skip
    _draw_histograms(panel, functions, low, high, 0.22 * (most + margin - bottom), bottom, theme)


def label_spots(curves: numpy.ndarray) -> list[int]:
    """Return where along `curves` `(groups, points)` each has its digit: far from other curves and digits."""
    height = float(numpy.nanmax(curves) - numpy.nanmin(curves)) or 1.0
    width = curves.shape[1]
    spots: list[int] = []
    for index, curve in enumerate(curves):
        gaps = numpy.abs(numpy.delete(curves, index, axis=0) - curve) / height
        score = numpy.fmin.reduce(numpy.fmin(gaps, 0.1), axis=0, initial=0.1)
        for other, spot in enumerate(spots):
            across, up = (numpy.arange(width) - spot) / width, (curve - curves[other, spot]) / height
            score = score + numpy.fmin(numpy.hypot(across, up), 0.12)
        inside = numpy.flatnonzero(~numpy.isnan(curve))
        inside = inside[(inside > 0.03 * width) & (inside < 0.97 * width)]
        middle = -0.02 * numpy.abs(
            numpy.arange(width) / width - 0.5
        )  # of equals the one nearest to the middle
        spots.append(int(inside[numpy.argmax((score + middle)[inside])]) if len(inside) else 0)
    return spots


def _draw_histograms(
    panel: Axes,
    functions: Sequence[LearnedFunction],
    low: float,
    high: float,
    height: float,
    bottom: float,
    theme: Theme,
) -> None:
    """Draw where each group's inputs are, along the lower edge; the highest histogram is `height` high."""
    edges = numpy.linspace(low, high, 61)
    counts = [
        numpy.histogram(function.inputs.x, edges, weights=function.inputs.weight)[0]
        for function in functions
        if function.inputs.counted
    ]
    top = max((count.max() for count in counts), default=0)
    if not top:
        return
    for function, count in zip(functions, counts, strict=True):
        color = COLORS[theme][function.group % len(COLORS[theme])]
        panel.stairs(
            bottom + height * count / top, edges, baseline=bottom, fill=True, color=color,
            alpha=0.35 if len(functions) == 1 else 0.13, zorder=1,
        )  # fmt: skip


def _dress(
    panel: Axes, functions: Sequence[LearnedFunction], *, first: bool, theme: Theme, look: Mapping[str, Any]
) -> None:
    """Give a panel its name, its grid and its ticks."""
    ink, page, line = INK[theme]
    function = functions[0]
    numbered = function.layer is not None and function.act in ("act1", "act2")
    text = look["text"]
    panel.set_facecolor(page)
    panel.set_title(
        f"layer {function.layer} {function.act}" if numbered else function.module or "activation",
        fontsize=text, color=ink, pad=2,
    )  # fmt: skip
    panel.axhline(0, color=line, linewidth=0.4, alpha=0.6, zorder=0)
    panel.axvline(0, color=line, linewidth=0.4, alpha=0.6, zorder=0)
    panel.locator_params(nbins=4 if text > 6 else 3)
    panel.tick_params(labelsize=text - 1, colors=ink, length=2, width=0.4, pad=1.2)
    for spine in panel.spines.values():
        spine.set(color=line, linewidth=0.4)


def _legend(
    functions: Sequence[LearnedFunction],
    compared: bool,
    what: What,
    theme: Theme,
    look: Mapping[str, Any],
    names: tuple[str, str],
) -> list[Any]:
    """Return the shared legend's lines: the groups, then what else is drawn."""
    from matplotlib.lines import Line2D

    ink, _, line = INK[theme]
    width, colors = look["line"] * 1.3, COLORS[theme]
    groups = sorted({function.group for function in functions})
    handles = [
        Line2D([], [], color=colors[g % len(colors)], linewidth=width, marker=f"${g}$", label=f"group {g}",
               markersize=1.5 * look["marker"], markeredgewidth=0.2)
        for g in groups
    ]  # fmt: skip
    known = {"identity" if function.init == "identity" else "GELU" for function in functions}
    prefix = "slope of " if what == "slope" else ""
    handles.append(Line2D([], [], color=line, linestyle="--", linewidth=width, label=f"{prefix}start"))
    label = "identity (act1), GELU (act2)" if len(known) == 2 else known.pop()
    handles.append(Line2D([], [], color=line, linestyle=":", linewidth=width, label=f"{prefix}{label}"))
    if compared:
        for name, style in zip(names, ("-", "-."), strict=True):
            handles.append(Line2D([], [], color=ink, linestyle=style, linewidth=width, label=name))
    return handles


def _columns(labels: Sequence[str], width: float, text: float) -> int:
    """Return how many columns of a legend, filled one by one, fit into a figure of a width in inches."""
    for rows in range(1, len(labels)):
        columns = [labels[start : start + rows] for start in range(0, len(labels), rows)]
        letters = sum(max(map(len, column)) * 0.58 + 4.5 for column in columns)  # and the line beside them
        if letters * text / 72 < width:
            return len(columns)
    return 1


def _curve(function: LearnedFunction, what: What):
    return function if what == "value" else function.slope


def _known_curve(name: str, what: What, x: numpy.ndarray) -> numpy.ndarray:
    y = in_kind(KNOWN[name], x)
    return y if what == "value" else numpy.gradient(y, x)


def figure_class(extra: str = "train"):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f"a figure needs matplotlib: pip install 'flashkat_hf[{extra}]' ({error})"
        ) from error
    return Figure
