"""The summary of a run: how good its model is, what it took, and what it ran on."""

import importlib.metadata
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..data.samples import ImageData
from .plan import Plan
from .state import Progress

PACKAGES = ("transformers", "accelerate", "timm", "triton")
RATES = ("images_per_second", "data_images_per_second", "step_images_per_second")


def summarize(
    plan: Plan,
    device: torch.device,
    data: ImageData,
    progress: Progress,
    image_size: int,
    metrics: list[dict[str, Any]],
    names: list[str],
    results: dict[str, Any],
    weights: str,
    test: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what summary.json says of a model whose `weights` ("raw" or "ema") had these `results`.

    `names` are those of the scores in them, the one that the best epoch was chosen by first. The results are
    those that epochs are compared by; `test` has the scores on the test images, if these are others and have
    been looked at.
    """
    settings = plan.settings
    suffix = "_ema" if weights == "ema" else ""
    measured = {name: results[f"{name}{suffix}"] for name in names} | {"count": results["count"]}
    shown = test or measured
    both = {"raw": results[names[0]], "ema": results.get(f"{names[0]}_ema")}
    if test:
        both = dict.fromkeys(both) | {weights: test[names[0]]}
    lines = [line for line in metrics if RATES[0] in line]
    return {
        "data": settings.data or data.name,
        "num_train_images": data.train.num_images,
        "num_test_images": shown["count"],
        "evaluated_on": "test images" if test else plan.selection.images,
        "epoch_chosen": plan.selection.text,
        "num_selection_images": results["count"] if plan.selection.every_epoch else None,
        f"selection_{names[0]}": measured[names[0]] if plan.selection.every_epoch else None,
        "num_labels": len(data.class_names),
        "image_size": image_size,
        "epochs": progress.epoch,
        "steps": progress.step,
        "batch_size": settings.batch_size,
        **{name: shown[name] for name in names},
        f"{names[0]}_raw": both["raw"],
        f"{names[0]}_ema": both["ema"],
        "weights": weights,
        "best_epoch": progress.best["epoch"],
        **{rate: statistics.median(line[rate] for line in lines) if lines else None for rate in RATES},
        "peak_memory_gib": round(progress.peak_memory / 2**30, 2) if progress.peak_memory else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        "num_processes": plan.num_processes,
        "precision": plan.precision,
        "compiled": plan.compiled,
        "started_from": settings.model,
        "seed": settings.seed,
        "skipped_updates": progress.skipped,
        "skipped_images": len(progress.unreadable),
        "seconds": round(progress.seconds, 1),
        "versions": versions(),
        "commit": commit(),
    }


def score(results: dict[str, Any], name: str) -> float:
    """Return the better of the raw and the averaged weights' scores; -1 where nothing was evaluated."""
    return max(results.get(name, -1.0), results.get(f"{name}_ema", -1.0))


def best_weights(results: dict[str, Any], name: str) -> str:
    """Return "ema" if the averaged weights have the better score, else "raw"."""
    return "ema" if results.get(f"{name}_ema", -1.0) > results[name] else "raw"


def versions() -> dict[str, str | None]:
    """Return the versions of Python and the packages that a result depends on; None for an absent one."""
    numbers: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            numbers[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            numbers[name] = None
    return {**numbers, "flashkat_hf": __version__}


def commit() -> str | None:
    """Return the git commit of this package's checkout, with "-dirty" if files differ; None outside git."""
    file = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", file.parent, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", file.name
        )  # else it is installed somewhere below another repository
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None
