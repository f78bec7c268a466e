"""The figures of docs/paper.md, each a function of the lines of the results file; they need matplotlib."""

from collections.abc import Callable

from plot import COLOURS

from .published import SLOWER
from .results import plain

STYLES = {
    "ViT": COLOURS["timm ViT"],
    "KAT": "#555555",
    "FlashKAT": "#9a9a9a",
    "algorithm 1": "#555555",
    "algorithm 2": "#9a9a9a",
    "ours": COLOURS["flashkat_hf"],
}
SHOWN = 0.02  # of all warp states: one that takes less in every contender is left out


def figure1(results: list[dict]):
    """Draw microseconds an image of the forward and the backward pass, a panel for each size."""
    from matplotlib.figure import Figure

    steps = [each for each in results if each["what"] == "training" and each["mode"] == "eager"]
    cases = {(each["provider"], each["size"]): each for each in steps}
    sizes = [size for size in SLOWER if ("ViT", size) in cases]
    providers = [
        name for name in ("ViT", "KAT", "FlashKAT", "ours") if any(name == case[0] for case in cases)
    ]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for place, name in enumerate(providers):
            result = cases.get((name, size))
            for offset, part in ((-0.2, "forward"), (0.2, "backward")) if result else ():
                scale = 1e3 / result["batch_size"]
                bars = axes.bar(
                    place + offset,
                    result[f"{part}_ms"] * scale,
                    0.38,
                    yerr=result[f"{part}_interval"] * scale,
                    color=STYLES[name],
                    hatch="//" if part == "backward" else None,
                    edgecolor="white",
                )
                axes.bar_label(bars, fmt=plain, fontsize=7, padding=2)
        axes.set_yscale("log")
        axes.margins(y=0.15)
        axes.set_xticks(range(len(providers)), providers)
        axes.set_title(size, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("microseconds an image", fontsize=9)
    figure.suptitle("forward pass, and backward pass (hatched), eager", fontsize=10)
    return figure


def warp_states(results: list[dict], names: tuple[str, ...]):
    """Draw the cycles of a warp in each state for each instruction that it issues in the backward pass."""
    from matplotlib.figure import Figure

    counted = {
        each["contender"]: {key[6:]: value for key, value in each.items() if key.startswith("warps_")}
        for each in results
        if each["what"] == "counters" and backward(each) and each["contender"] in names
    }
    states = sorted({state for values in counted.values() for state in values})
    states = [
        state
        for state in states
        if any(values.get(state, 0) > SHOWN * sum(values.values()) for values in counted.values())
    ]
    states.sort(key=lambda state: max(values.get(state, 0) for values in counted.values()))
    figure = Figure(figsize=(8, 0.8 + 0.28 * len(states) * len(counted)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(counted)
    for place, (name, values) in enumerate(counted.items()):
        places = [position - place * height for position in range(len(states))]
        lengths = [values.get(state, 0) for state in states]
        bars = axes.barh(places, lengths, height * 0.95, color=STYLES[name], label=name)
        axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
    middle = (len(counted) - 1) * height / 2
    axes.set_yticks(
        [position - middle for position in range(len(states))], [state.replace("_", " ") for state in states]
    )
    axes.set_xlabel("cycles of a warp for each instruction that it issues", fontsize=9)
    axes.margins(x=0.12)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def backward(result: dict) -> bool:
    """Return whether a result is of the backward pass in float32, its arithmetic done once."""
    return (result["direction"], result["dtype"], result["repeats"]) == ("backward", "float32", 1)


def figure2(results: list[dict]):
    return warp_states(results, ("algorithm 1",))


def figure3(results: list[dict]):
    return warp_states(results, ("algorithm 2", "ours"))


def errors(results: list[dict]):
    """Draw the mean absolute error of both tables' gradients against the images of a batch."""
    from matplotlib.figure import Figure

    lines = [each for each in results if each["what"] == "error" and "original" not in each["contender"]]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, gradient in zip(figure.subplots(1, 2), ("dA", "dB"), strict=True):
        for name, dtype in dict.fromkeys((each["contender"], each["dtype"]) for each in lines):
            line = {
                each["shape"][0]: each
                for each in lines
                if (each["contender"], each["dtype"], each["gradient"]) == (name, dtype, gradient)
            }
            images = sorted(line)
            axes.errorbar(
                images,
                [line[count]["error"] for count in images],
                yerr=[line[count]["error_interval"] for count in images],
                fmt="o-" if dtype == "float32" else "s--",
                color=STYLES[name],
                label=f"{name}, {dtype}",
                markersize=4,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({each["shape"][0] for each in lines})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_title(gradient, fontsize=10)
        axes.set_xlabel("images", fontsize=9)
        axes.tick_params(labelsize=8)
    figure.supylabel("mean absolute error", fontsize=9)
    figure.axes[0].legend(fontsize=7)
    return figure


def has(what: str, **keys: str) -> Callable[[list[dict]], bool]:
    """Return a function that tells whether results hold a line of that kind."""
    return lambda results: any(
        each["what"] == what and all(each[key] == value for key, value in keys.items()) for each in results
    )


# picture, what it needs, how it is drawn
FIGURES: dict[str, tuple[Callable[[list[dict]], bool], Callable]] = {
    "paper_figure1.png": (has("training", provider="ViT", mode="eager"), figure1),
    "paper_figure2.png": (has("counters", contender="algorithm 1", direction="backward"), figure2),
    "paper_figure3.png": (has("counters", contender="ours", direction="backward"), figure3),
    "paper_errors.png": (has("error"), errors),
}
