"""The paper's argument, a statement at a time, held against what was measured."""

from collections.abc import Iterator

from speed_tables import table

from . import published
from .results import FLASHKAT, KAT, NONE, OURS, THROUGHPUTS, Results, ratio, show

SIZES, MODES = tuple(published.MODELS), ("eager", "compiled")


def verdict(holds: bool | None, why: str = "") -> str:
    """Say whether a statement holds on this GPU, or that it was not measured."""
    if holds is None:
        return "not measured"
    return "yes" if holds else f"**no**{': ' if why else ''}{why}"


def statements(results: Results) -> Iterator[tuple[str, str, str, str]]:
    """Yield the paper's argument by statements: its number, ours, and whether it holds here."""
    kat, flashkat, ours = (results.kernel(name) for name in (KAT, FLASHKAT, OURS))
    slower = [
        ratio(results.training("ViT", size), results.training("KAT", size), "images_per_s") for size in SIZES
    ]
    known = [value for value in slower if value]
    yield (
        "a KAT trains 100 times slower than a ViT of its size",
        ", ".join(f"{published.SLOWER[size]}" for size in SIZES) + " (T, S, B)",
        ", ".join(show(value, ".0f") for value in slower),
        verdict(min(known) >= 50 if known else None),
    )
    most = max((each["repeats"] for each in results.all("kernel", contender=KAT)), default=1)
    times = [
        ratio(results.kernel(KAT, direction, repeats=most), results.kernel(KAT, direction), "ms")
        for direction in ("forward", "backward")
    ]
    for direction, value in zip(("forward", "backward"), times, strict=True):
        yield (
            f"arithmetic is not to blame: {most} times as much leaves the {direction} pass's time as it is",
            "1.00 times the time",
            f"{show(value, '.2f')} times the time",
            verdict(value <= 1.1 if value and most > 1 else None, "it shows here"),
        )
    value = ratio(kat, results.kernel(KAT, "forward"), "ms")
    yield (
        "the backward pass is to blame: its time over that of the forward pass",
        f"{published.BACKWARD[KAT]['ms'] / published.FORWARD[KAT]['ms']:.0f}",
        show(value, ".0f"),
        verdict(value >= 50 if value else None),
    )
    highest = max((kat[key] for key in THROUGHPUTS if key in kat), default=None)
    yield (
        "bandwidth is not used up: KAT's highest throughput (of SM, L1, L2, HBM), in percent of its peak",
        f"{max(published.BACKWARD[KAT][key] for key in THROUGHPUTS):.1f}%",
        show(highest, ".1f", "%"),
        verdict(highest < 50 if highest is not None else None),
    )
    states = {key[6:]: value for key, value in kat.items() if key.startswith("warps_")}
    waits = {key: value for key, value in states.items() if key != "selected"}
    share = waits["long_scoreboard"] / sum(waits.values()) if waits.get("long_scoreboard") else None
    longest = sorted(waits, key=waits.__getitem__)[-2:] if waits else []
    shares = [f"{name.replace('_', ' ')} {waits[name] / sum(waits.values()):.0%}" for name in longest[::-1]]
    yield (
        "KAT's warps wait for the long scoreboard alone: its share of all waiting",
        "nearly all",
        show(share, ".0%"),
        verdict(share >= 0.9 if share is not None else None, f"the longest are {', '.join(shares)}"),
    )
    selected = states.get("selected")
    yield (
        "KAT's warps wait for the long scoreboard 412 times as long as they issue",
        "412",
        show(states["long_scoreboard"] / selected if selected else None, ".0f"),
        verdict(states["long_scoreboard"] / selected >= 100 if selected else None),
    )
    value = ratio(kat, flashkat, "ms")
    yield (
        "sums inside a block make the backward pass 140 times faster",
        f"{published.BACKWARD[KAT]['ms'] / published.BACKWARD[FLASHKAT]['ms']:.1f}",
        show(value, ".0f"),
        verdict(value >= 70 if value else None),
    )
    faster = [
        ratio(results.training("FlashKAT", size), results.training("KAT", size), "images_per_s")
        for size in SIZES
    ]
    known = [value for value in faster if value]
    rates = published.THROUGHPUT
    yield (
        "so FlashKAT trains up to 86.5 times faster than KAT (T, S, B)",
        ", ".join(f"{rates['FlashKAT'][size] / rates['KAT'][size]:.1f}" for size in SIZES),
        ", ".join(show(value, ".1f") for value in faster),
        verdict(max(known) >= 43 if known else None),
    )
    gaps = {
        (size, mode): 1 - value
        for size in SIZES
        for mode in MODES
        if (
            value := ratio(
                results.training("FlashKAT", size, mode), results.training("ViT", size, mode), "images_per_s"
            )
        )
    }
    yield (
        "the remaining gap to the ViT is 25% of its throughput",
        ", ".join(f"{1 - rates['FlashKAT'][size] / rates['ViT'][size]:.0%}" for size in SIZES),
        ", ".join(f"{size} {mode} {gap:.0%}" for (size, mode), gap in gaps.items()) or NONE,
        verdict(all(0.2 <= gap <= 0.3 for gap in gaps.values()) if gaps else None),
    )
    for gradient in ("dA", "dB"):
        value = ratio(results.error(KAT, gradient), results.error(FLASHKAT, gradient), "error")
        yield (
            f"and FlashKAT rounds better: KAT's error of {gradient} over FlashKAT's",
            f"{published.ERRORS[KAT][gradient][0] / published.ERRORS[FLASHKAT][gradient][0]:.0f}",
            show(value, ".3g"),
            verdict(value >= 10 if value else None),
        )
    value = ratio(flashkat, ours, "ms")
    yield (
        "ours: speed of the backward pass over algorithm 2's, float32, 768 channels",
        NONE,
        show(value, ".2f", " times as fast"),
        verdict(value >= 2.5 if value else None, "2.5 was asked"),
    )
    for gradient in ("dA", "dB"):
        value = ratio(results.error(OURS, gradient), results.error(FLASHKAT, gradient), "error")
        yield (
            f"ours: error of {gradient} over algorithm 2's",
            NONE,
            show(value, ".2f"),
            verdict(value <= 1 if value else None),
        )
    better = [
        value
        for size in SIZES
        for mode in MODES
        if (
            value := ratio(
                results.training(OURS, size, mode), results.training("FlashKAT", size, mode), "images_per_s"
            )
        )
    ]
    yield (
        "ours: training throughput over FlashKAT's, the least of all sizes and modes",
        NONE,
        show(min(better, default=None), ".2f"),
        verdict(min(better) > 1 if better else None),
    )


def argument(results: Results) -> str:
    return table(["statement", "published", "here", "holds here"], list(statements(results)))
