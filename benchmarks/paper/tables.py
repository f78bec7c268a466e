"""The tables of docs/paper.md, each a function of the results."""

from speed_tables import distinct, table

from . import published
from .figures import FIGURES
from .results import (
    FLASHKAT,
    KAT,
    NONE,
    OURS,
    RELAXED,
    THROUGHPUTS,
    Results,
    count,
    plain,
    ratio,
    show,
    with_interval,
)

SIZES = tuple(published.MODELS)


def figure1(results: Results) -> str:
    """Return the table of the models' forward and backward passes, eager."""
    rows = []
    for provider in distinct(each["provider"] for each in results.all("training", mode="eager")):
        cells = []
        for size in SIZES:
            result = results.training(provider, size)
            scale = 1e3 / result["batch_size"] if result else 0
            parts = (
                f"{plain(result[f'{part}_ms'] * scale)} ± {plain(result[f'{part}_interval'] * scale, '.2g')}"
                for part in ("forward", "backward")
                if result
            )
            cells.append(" and ".join(parts) or NONE)
        passes = distinct(
            f"{each['passes']} after {each['warm_up']}, batch {each['batch_size']}"
            for each in results.all("training", mode="eager", provider=provider)
        )
        rows.append([provider, *cells, "; ".join(passes)])
    header = ["µs an image, forward and backward", *SIZES, "passes"]
    return table(header, rows) + picture(results, "figure1", "Forward and backward pass of the models")


def table1(results: Results) -> str:
    formulas = [[name, *(f"`{text}`" for text in published.FORMULAS[name])] for name in published.FORMULAS]
    rows = []
    for each in results.all("layer"):
        agrees = "yes" if each["products_expected"] == each["products_counted"] else "**no**"
        counted = "yes" if each["parameters"] == each["parameters_counted"] else "**no**"
        rows.append(
            [
                f"{each['size']}, {each['layer']}",
                f"{each['parameters']:,}",
                counted,
                count(each["operations"]),
                count(each["products_counted"]),
                agrees,
            ]
        )
    header = [
        "layer",
        "parameters",
        "as counted",
        "operations, formula",
        "in products, counted",
        "as expected",
    ]
    return (
        table(["layer", "parameters", "operations for a token"], formulas)
        + f"\n\n{published.SYMBOLS}\n\n"
        + table(header, rows)
    )


def table2(results: Results) -> str:
    rows = []
    for direction in ("forward", "backward"):
        repeated = {each["repeats"] for each in results.all("kernel", direction=direction, contender=KAT)}
        for repeats in sorted(repeated):
            kat = results.kernel(KAT, direction, repeats=repeats)
            flashkat = results.kernel(FLASHKAT, direction, repeats=repeats)
            ours = results.kernel(OURS, direction, repeats=repeats)
            stated = (published.FORWARD if direction == "forward" else published.BACKWARD)[KAT]["ms"]
            rows.append(
                [
                    f"{direction}, x{repeats}",
                    show(stated, ",.4g"),
                    with_interval(kat, "ms", "ms_interval", ",.4g"),
                    count(kat.get("cycles")),
                    *(show(kat.get(key), ".3g") for key in THROUGHPUTS),
                    show(flashkat.get("ms"), ".4g"),
                    show(ours.get("ms"), ".4g"),
                ]
            )
    header = ["pass, arithmetic", "published, ms", "algorithm 1 here, ms", "cycles"]
    header += [f"{name}, %" for name in THROUGHPUTS.values()]
    return table([*header, "algorithm 2, ms", "ours, ms"], rows)


def table3(results: Results) -> str:
    names = distinct(
        (each["contender"], each["dtype"]) for each in results.all("kernel", direction="backward", repeats=1)
    )
    order = [KAT, RELAXED, FLASHKAT, OURS]
    names.sort(key=lambda case: order.index(case[0]) if case[0] in order else len(order))
    base = results.kernel(KAT)
    rows = []
    for name in (KAT, FLASHKAT):
        stated = published.BACKWARD[name]
        rows.append(
            [f"{name}, published", count(stated["cycles"]), f"{stated['ms']:,.4g}"]
            + [f"{stated[key]:.3g}" for key in THROUGHPUTS]
            + [f"{published.BACKWARD[KAT]['ms'] / stated['ms']:.4g}"]
        )
    for name, dtype in names:
        result = results.kernel(name, dtype=dtype)
        rows.append(
            [
                f"{name}, {dtype}",
                count(result.get("cycles")),
                with_interval(result, "ms", "ms_interval", ",.4g"),
            ]
            + [show(result.get(key)) for key in THROUGHPUTS]
            + [show(ratio(base, result, "ms"), ".4g")]
        )
    copy = results.last("copy").get("gb_per_s")
    images, tokens, channels = published.SHAPE
    number_bytes = 3 * images * tokens * channels * 4
    note = ""
    if copy:
        note = f"\n\nA copy reaches {copy / 1e3:.2f} TB/s; at that rate x and two gradients in float32 "
        note += f"({number_bytes / 1e9:.2f} GB) move in {number_bytes / copy / 1e6:.3g} ms at best. "
        note += f"In the published {published.BACKWARD[FLASHKAT]['ms']} ms they move at "
        note += (
            f"{number_bytes / published.BACKWARD[FLASHKAT]['ms'] / 1e6:.0f} GB/s: not those of an H200, so "
        )
        note += "compare ratios with the published rows, not milliseconds."
    header = ["backward pass", "cycles", "ms", *(f"{name}, %" for name in THROUGHPUTS.values())]
    return table([*header, "times as fast as algorithm 1"], rows) + note


def warp_states(results: Results) -> str:
    names = [name for name in (KAT, FLASHKAT, OURS) if results.kernel(name).get("warps_selected") is not None]
    states = distinct(key for name in names for key in results.kernel(name) if key.startswith("warps_"))
    states.sort(key=lambda state: -max(results.kernel(name).get(state, 0) for name in names))
    rows = []
    for state in states[:8] + [state for state in states[8:] if state == "warps_selected"]:
        stated = [published.STALLS[name].get(state[6:]) for name in (KAT, FLASHKAT)]
        rows.append(
            [state[6:].replace("_", " "), *(show(value) for value in stated)]
            + [show(results.kernel(name).get(state)) for name in names]
        )
    header = ["cycles for each instruction", f"{KAT}, published", f"{FLASHKAT}, published"]
    text = table([*header, *(f"{name}, here" for name in names)], rows)
    text += picture(results, "figure2", "Warp states of algorithm 1")
    return text + picture(results, "figure3", "Warp states of algorithm 2 and ours")


def table4(results: Results) -> str:
    providers = distinct(each["provider"] for each in results.all("training"))
    rows = []
    for size in SIZES:
        for provider in providers:
            eager, compiled = (results.training(provider, size, mode) for mode in ("eager", "compiled"))
            best = max((each["images_per_s"] for each in (eager, compiled) if each), default=None)
            vit = [results.training("ViT", size, mode).get("images_per_s") for mode in ("eager", "compiled")]
            fastest = max((rate for rate in vit if rate), default=None)
            if eager or compiled:
                rows.append(
                    [
                        f"{size}, {provider}",
                        show(published.THROUGHPUT.get(provider, {}).get(size), ",.2f"),
                        with_interval(eager, "images_per_s", "images_interval", ",.1f"),
                        with_interval(compiled, "images_per_s", "images_interval", ",.1f"),
                        str((eager or compiled)["batch_size"]),
                        show(best / fastest if best and fastest else None, ".2f"),
                        show(published.ACCURACY.get(provider, {}).get(size), ".1f", "%"),
                    ]
                )
    header = ["training, images/s", "published", "here, eager", "here, compiled", "batch"]
    return table([*header, "best here over the best ViT", "top-1, published"], rows)


def table5(results: Results) -> str:
    rows = []
    for gradient in ("dA", "dB"):
        cases = distinct(
            (each["contender"], each["dtype"]) for each in results.all("error", gradient=gradient)
        )
        for name, dtype in cases:
            result = results.error(name, gradient, dtype)
            stated = published.ERRORS.get(name, {}).get(gradient, (None, None))
            rows.append(
                [
                    f"{gradient}, {name}, {dtype}",
                    show(stated[0], ".2e"),
                    with_interval(result, "error", "error_interval", ".2e"),
                    show(stated[1], ".2e"),
                    with_interval(result, "variance", "variance_interval", ".2e"),
                    f"{result['agree']} of {result['compared']}",
                    str(result["shape"][0]),
                ]
            )
    header = ["gradient", "error, published", "error, here", "variance, published", "variance, here"]
    return table([*header, "two runs agree bit for bit", "images"], rows)


def table8(results: Results) -> str:
    images = sorted({each["shape"][0] for each in results.all("error")})
    rows = [
        [f"{gradient}, {name}, {dtype}"]
        + [
            with_interval(results.error(name, gradient, dtype, number), "error", "error_interval", ".2e")
            for number in images
        ]
        for gradient in ("dA", "dB")
        for name, dtype in distinct((each["contender"], each["dtype"]) for each in results.all("error"))
    ]
    header = ["mean absolute error", *(f"{number} images" for number in images)]
    return table(header, rows) + picture(results, "errors", "Error of the gradients against the batch")


def memory(results: Results) -> str:
    rows = []
    for each in results.all("accesses"):
        counted = results.kernel(each["contender"])
        hbm = [counted.get(f"hbm_{way}_bytes") for way in ("read", "write")]
        added = [counted.get(f"l2_{way}_bytes") for way in ("atomic", "reduction")]
        atomic = (
            sum(value for value in added if value is not None) if any(v is not None for v in added) else None
        )
        rows.append(
            [
                each["contender"],
                *(count(each[key]) for key in ("reads", "writes", "atomics", "accesses")),
                count(4 * each["accesses"]),
                *(count(value) for value in hbm),
                count(counted.get("l2_read_bytes")),
                count(counted.get("l2_write_bytes")),
                count(atomic),
            ]
        )
    header = ["backward pass", "reads", "writes", "atomic additions", "accesses", "accesses, bytes"]
    header += ["HBM read, bytes", "HBM written", "L2 read", "L2 written", "L2 atomic"]
    return table(header, rows)


def table6(results: Results) -> str:
    rows = []
    for size in SIZES:
        ours = results.last("model", size=size)
        for name, stated in (ours.get("published") or {}).items():
            shown = (
                [count(stated), count(ours[name])] if name == "parameters" else [str(stated), str(ours[name])]
            )
            rows.append([f"{size}, {name}", *shown])
    return table(["model", "published", "ours"], rows)


def table7(results: Results) -> str:
    rows = []
    for name, (text, settings) in published.HYPERPARAMETERS.items():
        values = [
            ", ".join(f"{setting} {results.last('recipe', size=size).get(setting)}" for setting in settings)
            for size in SIZES
        ]
        rows.append([name, text, "; ".join(distinct(values))])
    rows.append(
        [
            "stochastic depth (T, S, B)",
            ", ".join(str(published.DROP_PATH[size]) for size in SIZES),
            ", ".join(str(results.last("recipe", size=size).get("drop_path")) for size in SIZES),
        ]
    )
    return table(["hyperparameter", "published", "`training/recipes/pretrain-*.yaml`"], rows)


def picture(results: Results, name: str, text: str) -> str:
    """Return the line that shows a figure, if the results hold what it needs."""
    file = f"paper_{name}.png"
    return f"\n\n![{text}]({file})" if FIGURES[file][0](results.lines) else ""
