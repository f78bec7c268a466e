"""The tables of docs/training.md about the defaults of `flashkat finetune`."""

from statistics import mean, stdev

DATA = {
    "digits": "scikit-learn's digits",
    "fashion4000": "Fashion-MNIST, 4,000 images",
    "fashion60000": "Fashion-MNIST, all 60,000",
}
NAMES = {
    "flashkat": "FlashKAT",
    "vit": "ViT (timm)",
    "released": "FlashKAT, released start",
    "converted": "ViT, converted",
}


def _error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5


def _measured(results: list[dict]) -> str:
    about = results[0]
    commits = dict.fromkeys(each["commit"][:7] for each in results if each["commit"])
    versions = about["versions"]
    packages = f"torch {versions['torch']}, timm {versions['timm']}"
    return f"{about['device']}, {packages}, commit {' and '.join(commits)}"


def defaults_table(results: list[dict]) -> str:
    """Return a row for each data set and model: test accuracy, its standard error, and the longest time."""
    on_cpu = results[0]["device"] == "CPU"
    rows = ["| data | model | test accuracy | seeds | epochs | longest run |", "|---" * 6 + "|"]
    for data, model in dict.fromkeys((each["data"], each["model"]) for each in results):
        runs = [each for each in results if (each["data"], each["model"]) == (data, model)]
        accuracies = [each["top1"] for each in runs]
        spread = f" ± {_error(accuracies):.2%}" if len(runs) > 1 else ""
        seconds = max(each["seconds"] for each in runs)
        busy = max(each["process_seconds"] for each in runs)
        time = f"{seconds:.0f} s" + f", {busy:.0f} s of the process" * on_cpu
        cells = [DATA[data], NAMES[model], f"{mean(accuracies):.2%}{spread}", str(len(runs))]
        rows.append("| " + " | ".join([*cells, str(runs[0]["epochs"]), time]) + " |")
    text = f"{_measured(results)}; `benchmarks/learning/defaults.py`."
    if on_cpu:
        text = f'"Of the process" is what training had of its cores, which other work shared. {text}'
    return "\n".join([*rows, "", text])


def checkpoints_table(results: list[dict]) -> str:
    """Return a row for each way: its mean accuracies, and how it differs from the middle, seed by seed."""
    cases = list(dict.fromkeys((each["model"], each["data"]) for each in results))
    score = {(each["model"], each["data"], each["way"], each["seed"]): each["accuracy"] for each in results}
    header = [f"{NAMES[model]}, on {data}" for model, data in cases]
    rows = ["| " + " | ".join(["way", *header, "difference"]) + " |", "|---" * (len(cases) + 2) + "|"]
    for way in dict.fromkeys(each["way"] for each in results):
        means = [mean(value for key, value in score.items() if key[:3] == (*case, way)) for case in cases]
        pairs = [
            value - score[(*key[:2], "middle", key[3])]
            for key, value in score.items()
            if key[2] == way and (*key[:2], "middle", key[3]) in score
        ]
        text = "" if way == "middle" else f"{100 * mean(pairs):+.2f} ± {100 * _error(pairs):.2f}"
        rows.append("| " + " | ".join([way, *(f"{value:.2%}" for value in means), text]) + " |")
    middle = next(each for each in results if each["way"] == "middle")
    text = (
        f"{middle['pictures']} images, {middle['epochs']} epochs, {len({each['seed'] for each in results})} "
        f"seeds; middle: learning rate {middle['learning_rate']:g}, all layers alike, coefficients decayed, "
        "random head. "
        f"Differences in percentage points, with standard errors. {_measured(results)}; "
        "`benchmarks/learning/checkpoints.py`."
    )
    return "\n".join([*rows, "", text])
