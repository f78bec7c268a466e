"""Tables of docs/performance.md, each a function of the lines of a results file."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

OURS = "flashkat_hf"
TOP_KERNELS = 15
CELL = ("size", "image_size", "batch_size", "mode")
SIZES = ("tiny", "small", "base")
MODES = ("eager", "compiled", "graphs")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_case(results: list[dict], *keys: str) -> dict[tuple, dict]:
    """Return the results by the values of `keys`; two of one case are an error, as a table shows only one."""
    cases = {}
    for result in results:
        case = tuple(result[key] for key in keys)
        if case in cases:
            raise SystemExit(f"two results for {', '.join(map(str, case))}: delete one from the results file")
        cases[case] = result
    return cases


def distinct(values: Iterable[Hashable]) -> list:
    return list(dict.fromkeys(values))


def measured(results: list[dict], script: str) -> str:
    """Return machine, versions and commits; by provider where these are not the same for all."""
    commits = defaultdict(set)
    for result in results:
        versions = [f"{name} {result[name]}" for name in ("torch", "triton", "timm") if result.get(name)]
        place = ", ".join(filter(None, [result["machine"], result.get("precision"), *versions]))
        commits[result["provider"], place].add(result["commit"][:7])
    providers = defaultdict(list)
    for (provider, place), found in commits.items():
        providers[f"{place}, commit {', '.join(sorted(found))}"].append(provider)
    lines = list(providers)
    if len(lines) > 1:
        lines = [f"{'; '.join(names)}: {line}" for line, names in providers.items()]
    return f"{'. '.join(lines)}. `{script}`"


def model_table(results: list[dict]) -> str:
    """Return a row for each provider and mode, a column for each size; then ours over each other provider.

    What was measured on different machines is not compared.
    """
    cases = by_case(results, "mode", "provider", "size")
    modes, providers, sizes = (
        distinct(result[key] for result in results) for key in ("mode", "provider", "size")
    )
    batches = {
        size: next(result["batch_size"] for result in results if result["size"] == size) for size in sizes
    }

    def cell(mode: str, provider: str, size: str) -> str:
        result = cases.get((mode, provider, size))
        if result is None:
            return ""
        notes = [f"{result['peak_gib']:.1f} GiB"] if result["peak_gib"] is not None else []
        if result["batch_size"] != batches[size]:
            notes.append(f"batch {result['batch_size']}")
        rate = result["images_per_s"]
        value = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        return f"{value} ({', '.join(notes)})" if notes else value

    def ratio(mode: str, provider: str, size: str) -> str:
        ours, theirs = cases.get((mode, OURS, size)), cases.get((mode, provider, size))
        if ours is None or theirs is None or ours["machine"] != theirs["machine"]:
            return ""
        text = f"{ours['images_per_s'] / theirs['images_per_s']:.2f}"
        if None in (ours["peak_gib"], theirs["peak_gib"]) or ours["batch_size"] != theirs["batch_size"]:
            return text
        return f"{text} (memory {ours['peak_gib'] / theirs['peak_gib']:.2f})"

    rows = []
    for show, names, label in (
        (cell, providers, "{}, {}"),
        (ratio, [name for name in providers if name != OURS], "ours / {}, {}"),
    ):
        for mode in modes:
            for provider in names:
                values = [show(mode, provider, size) for size in sizes]
                if any(values):
                    rows.append([label.format(provider, mode), *values])
    task = "training step" if results[0]["task"] == "train" else "inference"
    pixels = ", ".join(str(size) for size in distinct(result["image_size"] for result in results))
    turns = distinct(result.get("turn", 1) for result in results)
    mean = f"the mean of {' or '.join(map(str, turns))} steps in a row"
    timing = "each step timed alone" if turns == [1] else mean
    note = f"10th percentile of turns, {timing}; {pixels} pixels. "
    note += f"{measured(results, 'benchmarks/bench_model.py')}."
    header = [f"{task}, images/s", *(f"{size}, batch {batches[size]}" for size in sizes)]
    return table(header, rows) + "\n\n" + note


def attention_table(results: list[dict]) -> str:
    """Return a row for each number of tokens, of the largest case: microseconds, and times as fast."""
    batch, heads = largest = max((result["batch_size"], result["heads"]) for result in results)
    chosen = [result for result in results if (result["batch_size"], result["heads"]) == largest]
    cases = by_case(chosen, "tokens", "provider")
    providers, rows = distinct(result["provider"] for result in chosen), []
    for tokens in distinct(result["tokens"] for result in chosen):
        row, totals = [f"{tokens:,}"], {}
        for provider in providers:
            result = cases[tokens, provider]
            forward, backward = result["forward_us"], result["backward_us"]
            totals[provider] = forward + backward
            row.append(f"{forward:,.0f} + {backward:,.0f}")
        fastest = min(total for provider, total in totals.items() if provider != OURS)
        rows.append([*row, f"{fastest / totals[OURS]:.2f}"])
    header = ["tokens", *(f"{provider}, µs" for provider in providers), "times as fast as the fastest other"]
    note = f"Forward + backward, {batch} sequences of {heads} heads of 64 channels. "
    return table(header, rows) + f"\n\n{note}{measured(results, 'benchmarks/bench_attention.py')}."


def predict_table(results: list[dict]) -> str:
    """Return a row for each run of `flashkat predict`: pictures a second, beside its parts."""
    rows = []
    for result in results:
        row = [f"{result['size']}, batch {result['batch_size']}", f"{result['predict_gpu']:,}"]
        parts = (result[name] for name in ("model_graphed", "gpu_decoder"))
        rows.append(row + [f"{part:,} ({result['predict_gpu'] / part:.2f})" for part in parts])
    header = ["JPEG files, pictures/s", "`flashkat predict`", "model alone", "decoder alone"]
    note = "In brackets: the command's speed over the part's"
    return table(header, rows) + f"\n\n{note}. {on_gpu(results)}; `benchmarks/bench_predict.py`."


def quantization_speed_table(results: list[dict]) -> str:
    """Return a row for each way of quantising: milliseconds by the number of images, eager and compiled."""
    cases, batches = by_case(results, "way", "batch_size"), distinct(each["batch_size"] for each in results)
    rows = []
    for way in distinct(each["way"] for each in results):
        found = [cases.get((way, batch)) for batch in batches]
        rows.append([way, *(f"{r['eager_ms']:.1f} / {r['compiled_ms']:.1f}" if r else "" for r in found)])
    header = ["ms, eager / compiled", *(f"batch {batch}" for batch in batches)]
    note = f"{results[0]['model']}, {on_gpu(results)}, torchao {results[-1]['torchao']}"
    return table(header, rows) + f"\n\n{note}; `benchmarks/bench_quantization.py`."


def group_rational_table(results: list[dict]) -> str:
    """Return a row for each shape and layout: the share of a copy's bandwidth, by dtype and direction."""
    cases = by_case(results, "case", "dtype", "direction")
    columns = distinct((each["dtype"], each["direction"]) for each in results)
    rows = [
        [case, *(f"{cases[case, *column]['of_copy']:.0%}" for column in columns)]
        for case in distinct(each["case"] for each in results)
    ]
    header = ["bandwidth, of a copy's", *(", ".join(column) for column in columns)]
    return table(header, rows) + f"\n\n{on_gpu(results)}; `benchmarks/bench_group_rational.py`."


def on_gpu(results: list[dict]) -> str:
    """Return the GPU and the versions of results, which are those of the last one, and their commits."""
    versions = ", ".join(f"{name} {results[-1][name]}" for name in ("torch", "triton"))
    commits = distinct(result["commit"][:7] for result in results)
    return f"{results[-1]['gpu']}, {versions}, commit {', '.join(commits)}"


def cell_ratios(results: list[dict]) -> dict[tuple, tuple[dict, float, int]]:
    """Return our result of each cell, its speed over that of the fastest other, and the number of others."""
    cells = defaultdict(dict)
    for result in results:
        cells[tuple(result[key] for key in CELL)][result["provider"]] = result
    ratios = {}
    for cell, found in cells.items():
        others = [result["images_per_s"] for provider, result in found.items() if provider != OURS]
        if OURS in found and others:
            ratios[cell] = found[OURS], found[OURS]["images_per_s"] / max(others), len(others)
    return ratios


def cells_table(results: list[dict]) -> str:
    """Return a row for each size, image size and batch: images/s and times the best ViT, by mode."""
    ratios = cell_ratios(results)
    modes = sorted(distinct(mode for *_, mode in ratios), key=MODES.index)
    others = [name for name in distinct(result["provider"] for result in results) if name != OURS]
    rows = []
    for cell in sorted(distinct(cell[:3] for cell in ratios), key=lambda cell: (SIZES.index(cell[0]), *cell)):
        row = [f"{cell[0]}, {cell[1]} pixels, batch {cell[2]}"]
        for mode in modes:
            ours, ratio, count = ratios.get((*cell, mode), (None, 0.0, 0))
            mark = "" if count == len(others) else "\\*"
            row.append(f"{ours['images_per_s']:,.0f} ({ratio:.2f}{mark})" if ours else "")
        rows.append(row)
    task = "training step" if results[0]["task"] == "train" else "inference"
    note = "Images/s of flashkat_hf, and in brackets how many times as fast it is as the fastest of: "
    marked = any(count < len(others) for *_, count in ratios.values())
    alone = f" (\\*: of {others[0]} alone)" if marked else ""
    note += f"{', '.join(others)}{alone}; "
    note += f"10th percentile of turns. {measured(results, 'benchmarks/bench_model.py')}."
    return table([task, *modes], rows) + "\n\n" + note


def runs_table(results: list[dict]) -> str:
    """Return a row for each whole run: transformers' Trainer, and ours."""
    rows = []
    for result in results:
        name = {"Trainer": "transformers' Trainer", "start": "our trainer, to the 10th update"}.get(
            result["case"], f"our trainer, {result['case']}"
        )
        parts = name, result.get("provider", OURS), result["mode"], f"batch {result['batch_size']}"
        rates = f"{result['images_per_s']:,.0f}" if "images_per_s" in result else ""
        seconds = result.get("update_10_s") if result["case"] == "start" else result.get("wall_s")
        rows.append([", ".join(parts), result["commit"][:7], rates, f"{seconds:.1f}" if seconds else ""])
    about = results[0]
    note = f"{about['size']}, 224 pixels, {about['machine']}, {about['precision']}, torch {about['torch']}, "
    note += f"transformers {about['transformers']}; `benchmarks/bench_runs.py`."
    return table(["run", "commit", "images/s", "seconds"], rows) + "\n\n" + note


def case_name(result: dict) -> str:
    return f"{result['provider']}, {result['mode']}"


def profile_table(results: list[dict]) -> str:
    """Return the milliseconds of a step in each class of kernels, a column for each provider."""
    totals = by_case([result for result in results if result["kernel"] == "total"], "provider", "mode")
    sums = defaultdict(float)
    for result in results:
        sums[result["class"], result["provider"], result["mode"]] += result["ms"]
    names = distinct(result["class"] for result in results if result["kernel"] != "total")
    names.sort(key=lambda name: -max(sums[name, *case] for case in totals))
    rows = [[name, *(f"{sums[name, *case]:.2f}" for case in totals)] for name in names]
    rows.append(["all kernels", *(f"{total['ms']:.2f}" for total in totals.values())])
    rows.append(
        ["step, as measured without the profiler", *(f"{total['wall_ms']:.2f}" for total in totals.values())]
    )
    rows.append(["kernels", *(f"{total['calls']:.0f}" for total in totals.values())])
    first = results[0]
    note = f"{first['size']}, batch {first['batch_size']}; {measured(results, 'benchmarks/profile_step.py')}."
    return table(["ms of a training step", *map(case_name, totals.values())], rows) + "\n\n" + note


def roofline_table(results: list[dict]) -> str:
    """Return a row for each of our kernels: its time, and the time it cannot go below and why."""
    total = next(result for result in results if result["provider"] == OURS and result["kernel"] == "total")
    copy, speed = total["copy_gb_per_s"], total["product_tflops"]
    rows = []
    for result in results:
        if (result["provider"], result["mode"]) == (OURS, total["mode"]) and "floor_ms" in result:
            moves, multiplies = result["bytes"] / copy / 1e6, result["operations"] / speed / 1e9
            rows.append(
                [
                    f"`{result['kernel']}`",
                    f"{result['calls']:.0f}",
                    f"{result['ms']:.2f}",
                    f"{result['floor_ms']:.2f}",
                    "memory" if moves >= multiplies else "products",
                    f"{result['floor_ms'] / result['ms']:.0%}",
                ]
            )
    header = ["kernel", "calls", "ms", "floor, ms", "floor set by", "floor / time"]
    note = f"Copy {copy / 1000:.2f} TB/s, bfloat16 products {speed:.0f} TFLOP/s, measured in the same run."
    return table(header, rows) + "\n\n" + note


def kernel_table(results: list[dict]) -> str:
    """Return a table of the slowest kernels of each provider."""
    parts = []
    for provider, mode in distinct((result["provider"], result["mode"]) for result in results):
        case = [result for result in results if (result["provider"], result["mode"]) == (provider, mode)]
        kernels = [result for result in case if result["kernel"] != "total"]
        kernels.sort(key=lambda kernel: -kernel["ms"])
        rows = [
            [f"`{kernel['kernel'][:80]}`", kernel["class"], f"{kernel['calls']:.0f}", f"{kernel['ms']:.2f}"]
            for kernel in kernels[:TOP_KERNELS]
        ]
        parts.append(f"{provider}, {mode}:\n\n" + table(["kernel", "class", "calls", "ms"], rows))
    return "\n\n".join(parts)


def compilation_table(results: list[dict]) -> str:
    """Return a row for each task and model: seconds, how they compare to ViT's, and the graph's nodes."""
    rows = [
        [
            f"`torch.{result['task']}`, {result['provider']}",
            f"{result['seconds']:.1f}",
            f"{result['processor_seconds']:.1f}",
            f"{result['of_vit']:.2f}",
            f"{result['nodes']:,}" if "nodes" in result else "",
        ]
        for result in results
    ]
    first = results[0]
    header = [f"{first['size']}, seconds", "wall", "processors", "of ViT's (processors)", "nodes"]
    note = (
        f"The fastest of {first['rounds']} turns, without caches; compiled is a training step, forward and "
    )
    note += f"backward. CPU, float32, torch {first['torch']}, timm {first['timm']}, "
    note += f"commit {first['commit'][:7]}. `benchmarks/bench_compilation.py`."
    return table(header, rows) + "\n\n" + note


def precision_table(results: list[dict]) -> str:
    """Return a row for each method: mean and largest error of the coefficients' gradients for each dtype."""
    cases = by_case(results, "method", "dtype")
    methods, dtypes = (distinct(result[key] for result in results) for key in ("method", "dtype"))
    rows = [
        [method]
        + [
            f"{cases[method, dtype][value]:.1e}" if (method, dtype) in cases else ""
            for dtype in dtypes
            for value in ("mean_error", "largest_error")
        ]
        for method in methods
    ]
    first = results[0]
    header = ["error of the coefficients' gradients"]
    header += [f"{dtype}, {value}" for dtype in dtypes for value in ("mean", "largest of a draw")]
    shape = " x ".join(map(str, first["shape"]))
    note = f"{first['draws']} draws of {shape} inputs, against float64, relative to the gradients' mean "
    note += f"absolute value. {first['machine']}, torch {first['torch']}, commit {first['commit'][:7]}. "
    note += "`benchmarks/bench_precision.py`."
    return table(header, rows) + "\n\n" + note


def deployment_table(results: list[dict]) -> str:
    """Return a row for each runtime, precision and model: the least time, and the median ratio to the ViT."""
    rows = []
    for case in distinct((result["runtime"], result["precision"], result["model"]) for result in results):
        runs = [r for r in results if (r["runtime"], r["precision"], r["model"]) == case]
        ratios = sorted(run["of_vit"] for run in runs)
        ratio = f"{ratios[len(ratios) // 2]:.2f}" + (
            f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if runs[1:] else ""
        )
        error = runs[-1].get("relative_difference")
        cells = [f"{min(run['ms'] for run in runs):.1f}", ratio, f"{runs[-1]['megabytes']:.1f}"]
        rows.append([*case, *cells, "" if error is None else f"{error:.0e}"])
    header = ["runtime", "precision", "model", "ms", "of the ViT", "MB", "logits differ by"]
    about = results[-1]
    versions = ", ".join(f"{name} {about[name]}" for name in ("onnxruntime", "openvino", "torch", "timm"))
    runs = len(results) // len(rows)
    place = f"{about['pixels']} pixels, batch {about['batch']}, one thread of {about['machine']}"
    note = (
        f"{about['size']} size, {place} that others used too: models in turn, the 10th percentile of the "
        f"rounds, of the processor's time; of {runs} runs the least time and the median (least to largest) "
        f"ratio. {versions}, commit {about['commit'][:7]}; `benchmarks/bench_deployment.py`."
    )
    return f"{table(header, rows)}\n\n{note}"
