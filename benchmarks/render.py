"""Write the documents' tables and pictures from the results files.

    python benchmarks/render.py [--check]

With --check, fail when a document says something else.
"""

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import plot
from learning import default_tables
from learning import tables as learning
from paper import render as paper_page
from speed_tables import (
    attention_table,
    cells_table,
    compilation_table,
    deployment_table,
    group_rational_table,
    kernel_table,
    model_table,
    precision_table,
    predict_table,
    profile_table,
    quantization_speed_table,
    roofline_table,
    runs_table,
)

ROOT = Path(__file__).parent.parent


def rational_table(results: list[dict], dtype: str = "bfloat16") -> str:
    """Return a row for each provider: the parts of the copy bandwidth that it reaches."""
    results = [result for result in results if result["dtype"] == dtype]
    columns = list(dict.fromkeys((result["direction"], result["shape"][-1]) for result in results))
    rows = [
        f"| {dtype}, part of the copy bandwidth | "
        + " | ".join(f"{direction}, {channels} channels" for direction, channels in columns)
        + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for provider in dict.fromkeys(result["provider"] for result in results):
        cells = [
            f"{result['of_copy']:.0%}"
            for column in columns
            for result in results
            if (result["provider"], result["direction"], result["shape"][-1]) == (provider, *column)
        ]
        rows.append(f"| {provider} | " + " | ".join(cells) + " |")
    about = results[0]
    batch, tokens, _ = about["shape"]
    rows += [
        "",
        f"{about['gpu']}, copy {about['copy_gb_per_s'] / 1000:.2f} TB/s, torch {about['torch']}, triton "
        f"{about['triton']}, {batch} x {tokens} tokens, commit {about['commit'][:7]}; "
        "`benchmarks/bench_rational.py`.",
    ]
    return "\n".join(rows)


def conversion_table(results: list[dict]) -> str:
    """Return a row for each ViT and variant: the mean over the seeds, and the worst seed's agreement."""
    header = "| ViT, channels x layers | act2 | logit error, rms | largest | top-1 differs "
    rows = [f"{header}| agreement, worst seed |", "|---" * 6 + "|"]
    for vit, variant in dict.fromkeys((result["vit"], result["variant"]) for result in results):
        runs = [result for result in results if (result["vit"], result["variant"]) == (vit, variant)]
        mean = sum(run["logit_rms_error"] for run in runs) / len(runs)
        largest, agreement = (
            max(run["logit_max_error"] for run in runs),
            min(run["agreement"] for run in runs),
        )
        differ, images = (sum(run[key] for run in runs) for key in ("differ", "images"))
        cells = [vit, variant, f"{mean:.2%}", f"{largest:.2%}", f"{differ} of {images:,}", f"{agreement:.2%}"]
        rows.append(f"| {' | '.join(cells)} |")
    about = results[0]
    accuracy = [result["accuracy_source"] for result in results]
    rows += [
        "",
        f"{len({result['seed'] for result in results})} seeds each; errors in standard deviations of the "
        f"ViT's logits; the ViTs' own accuracy on the held-out digits is {min(accuracy):.1%} to "
        f"{max(accuracy):.1%}; calibrated on {about['calibration_images']} training images. "
        f"torch {about['torch']}, timm {about['timm']}, transformers {about['transformers']}, "
        f"commit {about['commit'][:7]}; `benchmarks/bench_conversion.py`.",
    ]
    return "\n".join(rows)


def card_speed(results: list[dict]) -> str:
    """Return the lines of our own model, which the model cards show."""
    return "".join(json.dumps(result) + "\n" for result in results if result["provider"] == "flashkat_hf")


def digits_table(results: list[dict]) -> str:
    """Return a row for each model: mean and spread of the accuracy after the last epoch, over the seeds."""
    rows = ["| held-out top-1 on the digits | last epoch | best epoch |", "|---" * 3 + "|"]
    for model, name in (("flashkat", "FlashKAT"), ("vit", "plain ViT (timm)")):
        runs = [result for result in results if result["model"] == model]
        last, best = ([run[key] for run in runs] for key in ("last_top1", "top1"))
        spread = f" ± {stdev(last):.2%}" if len(runs) > 1 else ""
        rows.append(f"| {name} | {mean(last):.2%}{spread} | {mean(best):.2%} |")
    about = results[0]
    commits = dict.fromkeys(result["commit"][:7] for result in results)
    rows += [
        "",
        f"{about['size']} size, {about['image_size']} pixels, from scratch by the same recipe "
        f"(`finetune-digits`, {about['epochs']} epochs), {len({result['seed'] for result in results})} "
        f"seeds, {about['device']}, torch {about['versions']['torch']}, timm {about['versions']['timm']}, "
        f"commit {' and '.join(commits)}; `benchmarks/bench_digits.py`.",
    ]
    return "\n".join(rows)


def dense_table(results: list[dict]) -> str:
    """Return a row for each example and backbone: its scores over the seeds, and the time of the example."""
    tasks = {
        "segment": ("`examples/segment.py`", {"mean_iou": "mean IoU", "pixels": "pixels"}),
        "detect": ("`examples/detect.py`", {"map": "mAP", "map_50": "at IoU 0.5"}),
    }
    header = "| | backbone | validation, mean of the seeds | each seed | both, longest |"
    rows = [header, "|---" * 5 + "|"]
    for what, model in dict.fromkeys((each["what"], each["model"]) for each in results):
        runs = [each for each in results if (each["what"], each["model"]) == (what, model)]
        title, scores = tasks[what]
        means = (f"{name} {mean(run['scores'][score] for run in runs):.1%}" for score, name in scores.items())
        each = ", ".join(f"{run['scores'][next(iter(scores))]:.1%}" for run in runs)
        seconds = max(run["seconds_of_both"] for run in runs)
        backbone = {"flashkat": "FlashKAT", "vit": "ViT"}[model]
        cells = title, backbone, ", ".join(means), each, f"{seconds:.0f} s"
        rows.append(f"| {' | '.join(cells)} |")
    about = results[-1]
    packages = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "transformers"))
    commits = " and ".join(dict.fromkeys(each["commit"][:7] for each in results))
    measured = f"{about['device']}, {packages}, commit {commits}; `benchmarks/bench_dense.py`."
    return "\n".join([*rows, "", measured])


def quantization_table(results: list[dict]) -> str:
    """Return a row for each device and way of quantising: accuracy on the digits, and the largest loss."""
    header = "| device | linear maps | models | top-1 on the digits | largest loss of a model, points |"
    rows, places = [header, "|---" * 5 + "|"], {}
    for device, way in dict.fromkeys((each["device"], each["way"]) for each in results):
        runs = [each for each in results if (each["device"], each["way"]) == (device, way)]
        loss, place = max(run["loss_in_points"] for run in runs), runs[-1].get("gpu", "CPU")
        cells = [place, way, str(len(runs)), f"{mean(run['top1'] for run in runs):.2f}%", f"{loss:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
        about = runs[-1]
        versions = f"torch {about['torch']}, torchao {about['torchao']}, commit {about['commit'][:7]}"
        places[f"{place}: {versions}"] = None
    models = "Models trained by the defaults, each with another seed"
    command = "`benchmarks/bench_quantization.py --accuracy true`"
    return "\n".join([*rows, "", f"{models}. {'; '.join(places)}; {command}."])


def picture(link: str, text: str) -> Callable[[list[dict]], str]:
    return lambda results: f"![{text}]({link})"


THROUGHPUT = "Training throughput of each model size beside timm's ViT"
CELLS = "How many times as fast a training step is as the faster ViT's, by size, image size and batch"
ACCURACIES = "Test accuracy of every run from scratch, a row for each contender"
PERFORMANCE, LEARNING = "docs/performance.md", "docs/learning.md"


def trained(result: dict) -> str:
    """Return the name of a run of the trainer in the tables: size, images a GPU, case."""
    case = ", ".join(result[name] for name in ("case", "on_device") if name in result)
    return f"{result['size']}, {result['batch_size']} a GPU: {case}"


def update_table(results: list[dict]) -> str:
    """Return where the time of an update goes, in milliseconds, for each case of the trainer."""
    measured = [result for result in results if result["case"] != "resume"]
    profile = {"compute_ms": "computing", "nccl_ms": "NCCL alone", "idle_ms": "idle"}
    if not any(name in result for result in measured for name in profile):
        profile = {}
    head = ["milliseconds of an update", "commit", "GPUs", "whole", "on the device", "between updates"]
    rows = [f"| {' | '.join([*head, *profile.values()])} |", "|---" * (len(head) + len(profile)) + "|"]
    for result in measured:
        images = 1e3 * result["batch_size"] * result["processes"]
        whole, device = (images / result[f"{rate}images_per_second"] for rate in ("", "step_"))
        times = [f"{time:.1f}" for time in (whole, device, whole - device)]
        times += [f"{result[name]:.1f}" if name in result else "" for name in profile]
        case = trained(result), result["commit"][:7], str(result["processes"])
        rows.append(f"| {' | '.join([*case, *times])} |")
    note = (
        "From the same runs as the table in [What a run leaves](#what-a-run-leaves). An update is on the "
        "device from the moment at which the GPU begins with its batch. Between updates the GPU waits for "
        "the next batch or for the host."
    )
    if profile:
        note += (
            " The last three columns are a profile of some updates of the first GPU in a further epoch, "
            "which torch.profiler can make slower: the time in which anything but NCCL runs, the time in "
            "which nothing but NCCL runs (which includes waiting for the other GPUs), and the time in which "
            "nothing runs."
        )
    return "\n".join([*rows, "", note])


def training_table(results: list[dict]) -> str:
    """Return a row for each case of the trainer, with its share of a linear rate."""
    measured = [result for result in results if result["case"] != "resume"]

    def kind(result: dict) -> tuple:
        return result["size"], result["batch_size"], result["device"], result["commit"]

    alone = [result for result in measured if (result["case"], result["processes"]) == ("synthetic", 1)]
    one_gpu = {kind(result): result["images_per_second"] for result in alone}
    rows = [
        "| pretraining recipe | commit | GPUs | images/s | of linear | GPU memory, GiB | to update 10 | "
        "checkpoint |",
        "|---" * 8 + "|",
    ]
    for result in measured:
        rate, processes = result["images_per_second"], result["processes"]
        share = f"{rate / processes / one_gpu[kind(result)]:.2f}" if kind(result) in one_gpu else ""
        cells = [trained(result), result["commit"][:7], processes, f"{rate:,.0f}", share]
        cells.append(result["peak_memory_gib"])
        cells += [f"{result[key]:.1f} s" if key in result else "" for key in ("start_up_s", "checkpoint_s")]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    places: dict[str, list[str]] = {}  # the commits measured at each place
    for about in measured:
        launched = "not compiled" if "fsdp2" in about["case"] else "CUDA graphs"
        mode, versions = "compiled" if about["compiled"] else launched, about["versions"]
        place = f"{about['device']}, {about['precision']}, {mode}, torch {versions['torch']}"
        places.setdefault(f"{place}, accelerate {versions['accelerate']}", []).append(about["commit"][:7])
    texts = [f"{place}, commit {', '.join(dict.fromkeys(commits))}" for place, commits in places.items()]
    rows += [
        "",
        "Linear is the synthetic rate of one GPU times their number. Memory is the most that PyTorch had "
        "allocated at one time; with CUDA graphs it leaves out the optimiser's state, 8 bytes a parameter. "
        f"{'; then '.join(texts)}. `benchmarks/bench_training.py`.",
    ]
    if same := [result["processes"] for result in results if result.get("same_bits")]:
        gpus = f"{max(same)} GPUs"
        rows[-1] += (
            f" After SIGTERM to the launcher on {gpus} a resumed run ended with the bits of a whole one."
        )
    return "\n".join(rows)


def data_table(results: list[dict]) -> str:
    """Return a row for each part that the GPU does and each number of workers."""
    rows = ["| what the GPU does | worker processes | images/s | host ms for a batch |", "|---" * 4 + "|"]
    for result in results:
        rates = f"{result['images_per_s']:,.0f} | {result['host_ms']:.1f}"
        rows.append(f"| {result['on_device']} | {result['workers']} | {rates} |")
    about = results[0]
    files = f"{about['file_size']} ({about['file_bytes'] / 1000:.0f} KB)"
    rows += [
        "",
        f"JPEG files of {files} to batches of {about['batch_size']} at {about['image_size']} pixels, the "
        f"pretraining recipe; {about['gpu'] or 'no GPU'}, {about['cpu_cores']} cores, torchvision "
        f"{about['torchvision']}, Pillow {about['pillow']}, "
        f"commit {about['commit'][:7]}; `benchmarks/bench_data.py`.",
    ]
    return "\n".join(rows)


# document, the marker's name, the results file, what is written there
TABLES: tuple[tuple[str, str, str, Callable[[list[dict]], str]], ...] = (
    ("README.md", "cells_picture", "cells", picture("docs/cells.png", CELLS)),
    ("docs/index.md", "defaults", "defaults", default_tables.defaults_table),
    ("docs/index.md", "defaults_gpu", "defaults_gpu", default_tables.defaults_table),
    ("docs/training.md", "digits", "digits", digits_table),
    ("docs/training.md", "digits_224", "digits_224", digits_table),
    ("docs/calibration.md", "conversion", "conversion", conversion_table),
    ("docs/training.md", "training", "training", training_table),
    ("docs/training.md", "updates", "training", update_table),
    ("docs/training.md", "defaults", "defaults", default_tables.defaults_table),
    ("docs/training.md", "defaults_gpu", "defaults_gpu", default_tables.defaults_table),
    ("docs/training.md", "checkpoints", "checkpoints", default_tables.checkpoints_table),
    ("docs/data.md", "data", "data", data_table),
    ("docs/deployment.md", "quantization", "quantization_accuracy", quantization_table),
    ("docs/deployment.md", "quantization_speed", "quantization", quantization_speed_table),
    ("docs/deployment.md", "predict", "predict", predict_table),
    ("docs/deployment.md", "deployment", "deployment", deployment_table),
    ("docs/rationals.md", "group_rational", "group_rational", group_rational_table),
    (PERFORMANCE, "throughput", "model", picture("throughput.png", THROUGHPUT)),
    (PERFORMANCE, "model", "model", model_table),
    (PERFORMANCE, "inference", "inference", model_table),
    (PERFORMANCE, "cells_picture", "cells", picture("cells.png", CELLS)),
    (PERFORMANCE, "cells", "cells", cells_table),
    (PERFORMANCE, "cells_inference", "cells_inference", cells_table),
    (PERFORMANCE, "runs", "runs", runs_table),
    (PERFORMANCE, "profile", "profile", profile_table),
    (PERFORMANCE, "roofline", "profile", roofline_table),
    (PERFORMANCE, "kernels", "profile", kernel_table),
    (PERFORMANCE, "rational", "rational", rational_table),
    (PERFORMANCE, "rational_float32", "rational", partial(rational_table, dtype="float32")),
    (PERFORMANCE, "attention", "attention", attention_table),
    (PERFORMANCE, "precision", "precision", precision_table),
    (PERFORMANCE, "precision_gpu", "precision_gpu", precision_table),
    (PERFORMANCE, "cpu_train", "cpu_train", model_table),
    (PERFORMANCE, "cpu_inference", "cpu_inference", model_table),
    ("docs/dense.md", "dense", "dense", dense_table),
    (PERFORMANCE, "compilation", "compilation", compilation_table),
    ("benchmarks/learning/design.md", "pilot", "learning_pilot", learning.pilot),
    (LEARNING, "learning_picture", "learning", picture("learning.png", ACCURACIES)),
    (LEARNING, "questions", "learning", learning.questions),
    (LEARNING, "equal_parameters", "learning", learning.equal_parameters),
    (LEARNING, "equal_time", "learning", learning.equal_time),
    (LEARNING, "variants", "learning", learning.variants),
    (LEARNING, "upcycled", "learning", learning.upcycled),
    (LEARNING, "became", "learning", learning.became),
    (LEARNING, "distilled", "learning", learning.distilled),
    (LEARNING, "low_precision", "learning", learning.precision),
    (LEARNING, "rates", "learning", learning.rates),
)
CARDS = ("model", "inference")  # results files whose lines of our own the model cards show


def results_path(name: str) -> Path:
    return ROOT / f"benchmarks/results/{name}.jsonl"


def read_results(name: str) -> list[dict]:
    try:
        return [json.loads(line) for line in results_path(name).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmarks/results/{name}.jsonl cannot be read: {error}") from error


def render(document: str, name: str, results: str, table: Callable[[list[dict]], str]) -> str:
    if f"<!-- benchmark:{name} -->\n<!-- /" in document and not results_path(results).exists():
        return document  # not measured yet, and nothing is claimed
    if f"<!-- benchmark:{name} -->" not in document:
        raise SystemExit(f"no place for the table {name}: a line <!-- benchmark:{name} --> is missing")
    text = table(read_results(results))
    markers = rf"(<!-- benchmark:{name} -->\n).*?(<!-- /benchmark:{name} -->)"
    return re.sub(markers, lambda match: f"{match[1]}{text}\n{match[2]}", document, flags=re.DOTALL)


def update(document: str, rendered: str) -> None:
    path = ROOT / document
    if "--check" not in sys.argv:
        path.write_text(rendered)
    elif rendered != path.read_text():
        raise SystemExit(f"{document} differs from the results files: run python benchmarks/render.py")


def main() -> None:
    measured = [result for name in CARDS if results_path(name).exists() for result in read_results(name)]
    update("model_cards/speed.jsonl", card_speed(measured))
    for document, *table in TABLES:
        update(document, render((ROOT / document).read_text(), *table))
    plot.update(check="--check" in sys.argv)
    paper_page.update(ROOT, check="--check" in sys.argv)
    print("the documents are as the results files have it")


if __name__ == "__main__":
    main()
