"""Write the documents' tables from the results files; with --check, fail when a document says something else.

python benchmarks/render.py [--check]
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent


def rational_table(results: list[dict]) -> str:
    """Part of the copy bandwidth that each provider reaches, a row for each provider, and what was measured where."""
    results = [result for result in results if result["dtype"] == "bfloat16"]
    columns = list(dict.fromkeys((result["direction"], result["shape"][-1]) for result in results))
    rows = [
        "| bfloat16, part of the copy bandwidth | "
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
        "`benchmarks/bench_rational.py`, float32 beside it in `benchmarks/results/rational.jsonl`.",
    ]
    return "\n".join(rows)


def conversion_table(results: list[dict]) -> str:
    """A row for each ViT and variant: the mean over the seeds, and the worst seed's agreement."""
    rows = [
        "| ViT, channels x layers | act2 | logit error, rms | largest | top-1 differs | agreement, worst seed |",
        "|---" * 6 + "|",
    ]
    for vit, variant in dict.fromkeys((result["vit"], result["variant"]) for result in results):
        runs = [result for result in results if (result["vit"], result["variant"]) == (vit, variant)]
        mean = sum(run["logit_rms_error"] for run in runs) / len(runs)
        largest, images = max(run["logit_max_error"] for run in runs), sum(run["images"] for run in runs)
        rows.append(
            f"| {vit} | {variant} | {mean:.2%} | {largest:.2%} | {sum(run['differ'] for run in runs)} of {images:,} | "
            f"{min(run['agreement'] for run in runs):.2%} |"
        )
    about = results[0]
    accuracy = [result["accuracy_source"] for result in results]
    rows += [
        "",
        f"{len({result['seed'] for result in results})} seeds each; errors in standard deviations of the ViT's logits; "
        f"the ViTs' own accuracy on the held-out digits is {min(accuracy):.1%} to {max(accuracy):.1%}; calibrated on "
        f"{about['calibration_images']} training images. torch {about['torch']}, timm {about['timm']}, transformers "
        f"{about['transformers']}, commit {about['commit'][:7]}; `benchmarks/bench_conversion.py`.",
    ]
    return "\n".join(rows)


def card_speed(results: list[dict]) -> str:
    """The lines of our own model, which the model cards show."""
    return "".join(json.dumps(result) + "\n" for result in results if result["provider"] == "flashkat_hf")


def digits_table(results: list[dict]) -> str:
    """A row for each model: mean and spread of the accuracy after the last epoch, over the seeds."""
    rows = ["| held-out top-1 on the digits | last epoch | best epoch |", "|---" * 3 + "|"]
    for model, name in (("flashkat", "FlashKAT"), ("vit", "plain ViT (timm)")):
        runs = [result for result in results if result["model"] == model]
        last, best = ([run[key] for run in runs] for key in ("last_top1", "top1"))
        spread = f" ± {stdev(last):.2%}" if len(runs) > 1 else ""
        rows.append(f"| {name} | {mean(last):.2%}{spread} | {mean(best):.2%} |")
    about = results[0]
    rows += [
        "",
        f"{about['size']} size, {about['image_size']} pixels, from scratch by the same recipe (`finetune-digits`, "
        f"{about['epochs']} epochs), {len({result['seed'] for result in results})} seeds, {about['device']}, torch "
        f"{about['versions']['torch']}, timm {about['versions']['timm']}, commit {about['commit'][:7]}; "
        "`benchmarks/bench_digits.py`.",
    ]
    return "\n".join(rows)


TABLES = (
    ("README.md", "digits", digits_table),
    ("README.md", "digits_224", digits_table),
    ("README.md", "rational", rational_table),
    ("docs/calibration.md", "conversion", conversion_table),
)


def read_results(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / f"benchmarks/results/{name}.jsonl").read_text().splitlines()]


def render(document: str, name: str, table: Callable[[list[dict]], str]) -> str:
    if f"<!-- benchmark:{name} -->\n<!-- /" in document and not (ROOT / f"benchmarks/results/{name}.jsonl").exists():
        return document  # not measured yet, and nothing is claimed
    text = table(read_results(name))
    markers = rf"(<!-- benchmark:{name} -->\n).*?(<!-- /benchmark:{name} -->)"
    return re.sub(markers, lambda match: f"{match[1]}{text}\n{match[2]}", document, flags=re.DOTALL)


def update(document: str, rendered: str) -> None:
    path = ROOT / document
    if "--check" not in sys.argv:
        path.write_text(rendered)
    elif rendered != path.read_text():
        raise SystemExit(f"{document} differs from the results files: run python benchmarks/render.py")


def main() -> None:
    update("model_cards/speed.jsonl", card_speed(read_results("model")))
    for document, name, table in TABLES:
        update(document, render((ROOT / document).read_text(), name, table))


if __name__ == "__main__":
    main()
