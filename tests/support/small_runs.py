"""Small training runs, for several test files and scripts."""

import json
from pathlib import Path

import numpy
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from flashkat_hf.data.augmentation import Augmentation
from flashkat_hf.training.recipe import Settings
from flashkat_hf.training.trainer import Trainer

TIMES = ("images_per_second", "data_images_per_second", "step_images_per_second")


def make_images(root: Path, train: int = 12, val: int = 3) -> Path:
    """An image folder of two classes of noise, in two colours."""
    generator = numpy.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, colour in (("green", (40, 160, 60)), ("red", (190, 50, 40))):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.normal(colour, 40, (20, 20, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def small_run(data: Path, output: Path, **others) -> Settings:
    """A micro model; three updates an epoch on `make_images`, each one noted."""
    values = {
        "fit_defaults": False,
        "size": "micro",
        "epochs": 2,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "log_steps": 1,
        "workers": 0,
    }
    settings = Settings(data=str(data), output=output, **{**values, **others})
    settings.augmentation = Augmentation(rand_augment=None, erasing=0.5)
    return settings


def metrics(output: Path) -> list[dict]:
    """The lines of metrics.jsonl, less what depends on the clock."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics(output) if line.get("kind") == "step"]


def weights(output: Path, name: str = "last") -> dict[str, Tensor]:
    return load_file(output / name / "model.safetensors")


def after_step(monkeypatch, step: int, action) -> None:
    """Call `action(trainer)` when a run has made update `step`."""
    update = Trainer._update

    def updated(trainer, batches) -> None:
        update(trainer, batches)
        if trainer.progress.step == step:
            action(trainer)

    monkeypatch.setattr(Trainer, "_update", updated)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
