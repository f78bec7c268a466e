"""Draw pictures of speed and learning in docs/ from the results files; `render.py` draws what has changed.

A picture carries the SHA-256 of its results file as "Source", so that a check tells an old picture from a new
one without drawing it. Needs matplotlib.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

from learning.figure import accuracies
from PIL import Image
from speed_tables import MODES, OURS, SIZES, cell_ratios, distinct

ROOT = Path(__file__).parent.parent
COLOURS = {OURS: "#c44e00", "timm ViT": "#4a6fa5", "timm ViT, matrix-product patches": "#7a9cc6"}
OTHERS = "#9a9a9a"


def throughput(results: list[dict]):
    """Draw images per second in training: a panel for each size, a bar for each provider.

    Bars are of compiled steps where those were measured.
    """
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(result["size"] for result in results))
    providers = list(dict.fromkeys(result["provider"] for result in results))
    rates = {
        (result["provider"], result["size"], result["mode"]): result["images_per_s"] for result in results
    }
    modes = {
        name: "compiled" if any((name, size, "compiled") in rates for size in sizes) else "eager"
        for name in providers
    }
    figure = Figure(figsize=(10, 0.9 + 0.35 * len(providers)), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0], sizes, strict=True):
        values = [rates.get((name, size, modes[name]), 0.0) for name in providers]
        labels = [f"{name}, {modes[name]}" for name in providers]
        bars = axes.barh(labels, values, color=[COLOURS.get(name, OTHERS) for name in providers])
        axes.bar_label(
            bars, [f"{value:,.0f}" if value else "not measured" for value in values], padding=3, fontsize=8
        )
        axes.set_xlim(0, 1.3 * max(values))
        axes.set_title(size, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()  # shared: the first provider on top
    machines = "; ".join(dict.fromkeys(result["machine"] for result in results))
    figure.supxlabel(f"training, images/s, {machines}", fontsize=9)
    return figure


def cells(results: list[dict]):
    """Draw how many times as fast a training step is as the faster ViT's: a panel for each mode."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    ratios = cell_ratios(results)
    modes = sorted(distinct(mode for *_, mode in ratios), key=MODES.index)
    batches = sorted({batch for _, _, batch, _ in ratios})
    rows = sorted(
        {(size, pixels) for size, pixels, *_ in ratios}, key=lambda row: (SIZES.index(row[0]), row[1])
    )
    figure = Figure(figsize=(0.6 + 3.4 * len(modes), 0.9 + 0.42 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        found = [
            [ratios.get((*row, batch, mode), (None, math.nan, 0))[1] for batch in batches] for row in rows
        ]
        axes.imshow(found, cmap="PuOr", norm=TwoSlopeNorm(1.0, 0.3, 3.0), aspect="auto")
        for y, line in enumerate(found):
            for x, ratio in enumerate(line):
                text = "" if math.isnan(ratio) else f"{ratio:.2f}"
                colour = "black" if 0.5 < ratio < 2 else "white"
                axes.text(x, y, text, color=colour, ha="center", va="center", fontsize=9)
        axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axes.set_title(mode, fontsize=10)
        axes.set_xlabel("images of a step", fontsize=9)
    axes = panels[0]
    axes.set_yticks(range(len(rows)), [f"{size}, {pixels} px" for size, pixels in rows])
    others = " and ".join(name for name in distinct(result["provider"] for result in results) if name != OURS)
    title = f"Training step of FlashKAT: times as fast as the faster of {others}; {results[0]['machine']}"
    figure.suptitle(title, fontsize=10)
    return figure


PICTURES: dict[str, tuple[str, Callable]] = {
    "docs/throughput.png": ("benchmarks/results/model.jsonl", throughput),
    "docs/cells.png": ("benchmarks/results/cells.jsonl", cells),
    "docs/learning.png": ("benchmarks/results/learning.jsonl", accuracies),
}


def is_current(picture: Path, results: Path) -> bool:
    """Return True if a picture was drawn from its results file as it is, or if there are no results yet."""
    if not results.exists():
        return True
    if not picture.exists():
        return False
    with Image.open(picture) as image:
        return image.info.get("Source") == digest(results)


def digest(results: Path) -> str:
    return hashlib.sha256(results.read_bytes()).hexdigest()


def draw(picture: Path, results: Path, plot: Callable) -> None:
    figure = plot([json.loads(line) for line in results.read_text().splitlines()])
    figure.savefig(picture, dpi=110, metadata={"Source": digest(results)})


def update(check: bool) -> None:
    """Draw what is not current; with `check`, end with one line instead."""
    for picture, (results, plot) in PICTURES.items():
        if not is_current(ROOT / picture, ROOT / results):
            if check:
                command = "python benchmarks/render.py"
                raise SystemExit(f"{picture} is not drawn from {results} as it is: run {command}")
            draw(ROOT / picture, ROOT / results, plot)


if __name__ == "__main__":
    update(check=False)
