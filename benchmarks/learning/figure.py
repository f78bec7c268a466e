"""The picture of docs/learning.md: every run's accuracy, a row for each contender."""

from collections.abc import Sequence

from .contenders import CONTENDERS, PRIMARY, VARIANTS
from .statistics import summary
from .tables import NAMES, Results, places

COLOURS = {"gelu": "#4a6fa5", "swiglu": "#2e8b57", "rational": "#c44e00"}


def accuracies(results: Sequence[dict]):
    """Draw the runs from scratch: a panel for each data set and machine, a dot for each seed.

    The bar is the mean with two standard errors on each side, the line GELU's mean.
    """
    from matplotlib.figure import Figure

    shown = [place for place in places(results) if Results(results, place).of("parameters", "gelu")]
    names = [
        name
        for name in (*PRIMARY, *VARIANTS)
        if any(Results(results, place).of("parameters", name) for place in shown)
    ]
    figure = Figure(figsize=(4.5 + 3.5 * len(shown), 1.2 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, max(len(shown), 1), sharey=True, squeeze=False)[0]
    for axes, place in zip(panels, shown, strict=False):
        here = Results(results, place)
        for height, name in enumerate(names):
            values = here.accuracy("parameters", name)
            if not values:
                continue
            colour, found = COLOURS[CONTENDERS[name].family], summary(values)
            points = [100 * value for value in values.values()]
            axes.plot(points, [height] * len(points), "o", color=colour, alpha=0.3, markersize=4)
            error = 200 * (found.error or 0.0)
            axes.errorbar(100 * found.mean, height, xerr=error, fmt="|", color=colour, markersize=11)
        axes.axvline(100 * summary(here.accuracy("parameters", "gelu")).mean, color="#4a6fa5", linewidth=0.7)
        axes.set_title(f"{NAMES[place.data]}\n{place.epochs} epochs, {place.machine}", fontsize=9)
        axes.set_xlabel("test accuracy, %", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), [CONTENDERS[name].text for name in names])
    panels[0].invert_yaxis()
    return figure
