"""Fine-tune small checkpoints in several ways: what the defaults for `--model` were chosen by.

    python -m benchmarks.learning.checkpoints --output benchmarks/results/checkpoints.jsonl

The same command again goes on where it was stopped. A FlashKAT and a timm ViT, of which `flashkat convert`
makes another, are trained by the defaults on Fashion-MNIST (4,000 pictures) and on the digits; each is
fine-tuned on 500 pictures of the other data set. `WAYS` are what is compared: each differs from the middle
one in what it names. Accuracies are those of the last epoch on training pictures that are used
for nothing else (2,000 of Fashion-MNIST, 900 of the digits): test pictures are not looked at.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.state import AcceleratorState, GradientState
from bench_digits import build_vit  # beside this folder, whose __init__ finds it
from PIL import Image
from torch import nn
from transformers import HfArgumentParser

from flashkat_hf import FlashKATConfig, convert
from flashkat_hf.data.augmentation import evaluation_transform
from flashkat_hf.data.digits import load_digits
from flashkat_hf.data.samples import Examples, ImageData, open_image
from flashkat_hf.training import train
from flashkat_hf.training.initial_model import build_model
from flashkat_hf.training.recipe import Settings
from flashkat_hf.training.task import ImageClassification

from .default_tables import checkpoints_table
from .fashion_mnist import CLASSES, load

PICTURES = 500  # to fine-tune on
OTHERS = {"fashion": 2000, "digits": 900}  # to compare on
PRETRAINED_ON = {"fashion": 4000, "digits": None}  # pictures; None: all
HEADS = ("random", "zero", "ridge")
MIDDLE = {"learning_rate": 1e-3, "layer_decay": 1.0, "decay_coefficients": True, "head": "random"}
WAYS = {
    "middle": {},
    "rate 1e-4": {"learning_rate": 1e-4},
    "rate 3e-4": {"learning_rate": 3e-4},
    "rate 2e-3": {"learning_rate": 2e-3},
    "rate 3e-3": {"learning_rate": 3e-3},
    "layer decay 0.75": {"layer_decay": 0.75},
    "layer decay 0.9": {"layer_decay": 0.9},
    "coefficients not decayed": {"decay_coefficients": False},
    "head zero": {"head": "zero"},
    "head by ridge regression": {"head": "ridge"},
}


@dataclass(frozen=True)
class Arguments:
    output: Path = field(metadata={"help": "JSON lines are added to this file"})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "of the fine-tuning"})
    models: list[str] = field(
        default_factory=lambda: ["flashkat", "converted"], metadata={"help": "of flashkat, converted"}
    )
    ways: list[str] = field(default_factory=lambda: list(WAYS), metadata={"help": f"of {', '.join(WAYS)}"})
    epochs: int = field(default=20, metadata={"help": "of the fine-tuning"})
    pretraining_epochs: int = field(default=20, metadata={"help": "of the checkpoints"})
    source: Path | None = field(default=None, metadata={"help": "folder of Fashion-MNIST's four files"})
    checkpoints: Path = field(default=Path("runs/checkpoints"), metadata={"help": "where they are kept"})
    commit: str | None = field(default=None, metadata={"help": "of the code measured; default: asks git"})

    def __post_init__(self):
        for name, known in (("ways", WAYS), ("models", ("flashkat", "converted"))):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise SystemExit(f"--{name}: {unknown[0]} is none of {', '.join(known)}")


def pictures(name: str, source: Path | None) -> tuple[list[Image.Image], list[int], list[str]]:
    """Return all training pictures of a data set, their labels and the names of the classes."""
    if name == "digits":
        data = load_digits()
        return list(data.train.images), list(data.train.labels), data.class_names
    images, labels, *_ = load(source)
    return [Image.fromarray(image) for image in images], labels.tolist(), CLASSES


def parts(labels: list[int], *counts: int | None, seed: int = 0) -> Iterator[list[int]]:
    """Yield the indices of disjoint parts of so many pictures, in a random order; None: all that are left."""
    order = numpy.random.default_rng(seed).permutation(len(labels)).tolist()
    for count in counts:
        yield order[:count]
        order = order[len(order) if count is None else count :]


def examples(images: list[Image.Image], labels: list[int], indices: list[int]) -> Examples:
    return Examples([images[index] for index in indices], [labels[index] for index in indices])


class InMemory(ImageClassification):
    """Classes of images that are in memory."""

    def __init__(self, data: ImageData):
        self.data = data

    def open_data(self, settings: Settings, rank: int, world_size: int) -> ImageData:
        return self.data


def fit(data: ImageData, settings: Settings, build: Callable | None = None) -> dict[str, Any]:
    """Train on data in memory; return the summary of the last epoch."""
    try:
        train(settings, build=build, task=InMemory(data))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return json.loads((settings.output / "last" / "summary.json").read_text())


def checkpoint(model: str, name: str, arguments: Arguments) -> Path:
    """Return the folder of a checkpoint that was trained on a data set, trained where it is missing."""
    folder = arguments.checkpoints / f"{model}_{name}"
    if folder.is_dir():
        return folder
    images, labels, class_names = pictures(name, arguments.source)
    used, test = parts(labels, PRETRAINED_ON[name] or len(labels) - 100, 100)
    data = ImageData(examples(images, labels, used), examples(images, labels, test), class_names, name)
    settings = Settings(
        data=name, output=arguments.checkpoints / f"run_{model}_{name}", overwrite=True,
        epochs=arguments.pretraining_epochs,
    )  # fmt: skip
    fit(data, settings, None if model == "flashkat" else build_vit)
    best = settings.output / "best"
    if model == "flashkat":
        best.rename(folder)
        return folder
    side = json.loads((best / "preprocessor_config.json").read_text())["crop_size"]["height"]
    size = json.loads((settings.output / "settings.json").read_text())["size"]
    heads = {"num_attention_heads": FlashKATConfig.from_size(size).num_attention_heads}
    convert(best / "model.safetensors", folder, image_size=side, settings=heads, transform="imagenet")
    return folder


def build(head: str, data: ImageData) -> Callable:
    """Return the builder of a model from a checkpoint whose fresh head starts in a way."""

    def built(settings: Settings, class_names: list[str]) -> tuple[nn.Module, Any]:
        network, processor = build_model(settings, class_names)
        model: Any = network
        if head != "random":
            nn.init.zeros_(model.classifier.weight)
        if head == "ridge":
            fit_head(model, evaluation_transform(processor), data.train)
        return model, processor

    return built


@torch.no_grad()
def fit_head(model: Any, transform: Callable, train: Examples, penalty: float = 1e-2) -> None:
    """Fit the classifier by ridge regression of the classes on the features of the training pictures.

    The logits' scale is 4: what smoothed labels ask for, some, and no more.
    """
    model.eval()
    batch = torch.stack([transform(open_image(image)) for image in train.images])
    features = torch.cat([model.flashkat(part).pooler_output for part in batch.split(100)]).double()
    mean, labels = features.mean(0), torch.tensor(train.labels)
    targets = nn.functional.one_hot(labels, model.num_labels).double()
    targets = targets - targets.mean(0)
    centered = features - mean
    gram = centered.T @ centered / len(centered)
    gram += penalty * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
    weight = 4 * torch.linalg.solve(gram, centered.T @ targets / len(centered)).T
    model.classifier.weight.copy_(weight)
    model.classifier.bias.copy_(-weight @ mean)
    model.train()


def measure(model: str, start: str, name: str, way: str, seed: int, arguments: Arguments) -> dict[str, Any]:
    """Fine-tune the checkpoint of one data set on another; return the line of the results."""
    images, labels, class_names = pictures(name, arguments.source)
    used, others = parts(labels, PICTURES, OTHERS[name], seed=1 + seed)
    data = ImageData(examples(images, labels, used), examples(images, labels, others), class_names, name)
    values = MIDDLE | WAYS[way]
    head = values.pop("head")
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            data=name,
            model=str(checkpoint(model, start, arguments)),
            output=Path(folder, "run"),
            seed=seed,
            epochs=arguments.epochs,
            evaluate_epochs=arguments.epochs,
            holdout=0.0,
            head="fresh",
            workers=0,
            **values,
        )
        summary = fit(data, settings, build(head, data))
    return {
        "what": "checkpoints",
        "model": model,
        "start": start,
        "data": name,
        "way": way,
        **values,
        "head": head,
        "pictures": len(used),
        "accuracy": summary["top1"],
        **{
            key: summary[key]
            for key in ("num_test_images", "epochs", "batch_size", "seed", "device", "versions")
        },
        "commit": arguments.commit or summary["commit"],
    }


def main(arguments: Arguments) -> None:
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    written = arguments.output.read_text() if arguments.output.exists() else ""
    results = [json.loads(line) for line in written.splitlines()]
    done = {tuple(each[key] for key in ("model", "data", "way", "seed")) for each in results}
    for seed in arguments.seeds:
        for model in arguments.models:
            for start, name in (("digits", "fashion"), ("fashion", "digits")):
                for way in arguments.ways:
                    if (model, name, way, seed) in done:
                        continue
                    results.append(measure(model, start, name, way, seed, arguments))
                    with arguments.output.open("a") as file:
                        file.write(json.dumps(results[-1]) + "\n")
    print(checkpoints_table(results))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses())
