"""Fine-tune a segmentation head, UperNet, on a FlashKAT backbone, and the same head on a ViT beside it.

    python examples/segment.py                                    # about three minutes on two CPU cores
    python examples/segment.py --data scenes --model runs/kat-tiny --image_size 512 --learning_rate 1e-4
    accelerate launch examples/segment.py --data scenes --model runs/kat-tiny --image_size 512 --twin false

`--data` is a folder with train/images, train/masks, val/images and val/masks: to each image belongs a mask of
its size and name, a PNG whose pixels are numbers of classes; 255 is left out. classes.txt has their names,
one a line.

Without `--data` the scenes are made up: two to four discs, squares, triangles and crosses of any colour, on
pieces of scikit-learn's two photographs, which shine through them. One half of each photograph trains, the
other validates.

The run's folder gets `flashkat` and, with `--twin`, `vit`, which `from_pretrained` loads; `summary.json` with
the IoU of each class; and `masks.png`. The ViT is transformers' Dinov2Backbone of the same width, depth and
heads, a plain ViT with layer scale; both start at random and learn by the same recipe, unless `--model` names
weights of the one. transformers' Trainer does the rest: bfloat16 on a GPU, several GPUs, averaging of
gradients.
"""

import json
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib
import numpy
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, UnidentifiedImageError
from transformers import (
    Dinov2Config,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    set_seed,
)

from flashkat_hf import FlashKATBackbone, FlashKATConfig
from flashkat_hf.data.samples import IMAGE_SUFFIXES
from flashkat_hf.messages import one_line

IGNORED = 255  # pixels of a mask that belong to nothing
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
SHAPES = ("disc", "square", "triangle", "cross")  # in made-up scenes
POSITIVE = ("image_size", "head_size", "epochs", "batch_size", "learning_rate", "num_scenes")


@dataclass(frozen=True)
class Settings:
    data: Path | None = field(
        default=None, metadata={"help": "folder of images and masks; default: made-up scenes"}
    )
    output: Path = field(default=Path("runs/segment"), metadata={"help": "folder of the run"})
    overwrite: bool = field(default=False, metadata={"help": "write into a folder that exists"})
    model: str | None = field(
        default=None, metadata={"help": "FlashKAT folder or Hub id; default: micro, at random"}
    )
    image_size: int = field(default=48, metadata={"help": "height and width that images are resized to"})
    head_size: int = field(default=32, metadata={"help": "channels of the head; UperNet's own are 512"})
    epochs: float = field(default=8.0, metadata={"help": "passes over the training images"})
    batch_size: int = field(default=8, metadata={"help": "images of a step and device"})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "highest; about 1e-4 for a backbone that has learned"}
    )
    max_steps: int = field(default=-1, metadata={"help": "stop after so many steps; the tests use 2"})
    num_scenes: int = field(
        default=1600, metadata={"help": "made-up scenes to train on; a quarter more validate"}
    )
    twin: bool = field(default=True, metadata={"help": "train the same head on a ViT, too"})
    seed: int = 0

    def __post_init__(self):
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise SystemExit(f"--{name}: {getattr(self, name)} must be positive")
        first = os.environ.get("RANK", "0") == "0"  # of several processes the others may come later
        if first and self.output.exists() and not self.overwrite:
            raise SystemExit(f"--output: {self.output} exists; --overwrite true writes into it")


class Scenes(torch.utils.data.Dataset):
    """Pairs of image and mask, paths or arrays, as a model takes them; flipped at random if `flips`."""

    def __init__(self, pairs: list[tuple], size: int, flips: bool = False):
        self.pairs, self.size, self.flips = pairs, (size, size), flips

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, mask = map(opened, self.pairs[index])
        image = image.convert("RGB").resize(self.size, Image.Resampling.BILINEAR)
        mask = mask.resize(self.size, Image.Resampling.NEAREST)
        pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 255
        item = {"pixel_values": (pixels - MEAN) / STD, "labels": torch.from_numpy(numpy.array(mask)).long()}
        if self.flips and torch.rand(()) < 0.5:
            item = {name: tensor.flip(-1) for name, tensor in item.items()}
        return item


def opened(picture: Path | numpy.ndarray) -> Image.Image:
    return Image.open(picture) if isinstance(picture, Path) else Image.fromarray(picture)


def read_folder(folder: Path) -> tuple[list[tuple], list[tuple], list[str]]:
    """Return the pairs of paths that train and that validate, and the classes' names.

    Raises:
        SystemExit: in one line: a folder, an image or a mask is missing, or a mask does not serve.
    """
    splits, largest = [], 0
    listed = folder / "classes.txt"
    names = listed.read_text().splitlines() if listed.is_file() else []
    names = [name.strip() for name in names if name.strip()]
    for split in ("train", "val"):
        images, masks = folder / split / "images", folder / split / "masks"
        for place in (images, masks):
            if not place.is_dir():
                raise SystemExit(f"--data: {place} is not a folder")
        pairs = []
        for image in sorted(path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES):
            mask = masks / f"{image.stem}.png"
            largest = max(largest, largest_class(image, mask, len(names)))
            pairs.append((image, mask))
        if not pairs:
            raise SystemExit(f"--data: {images} holds no images")
        splits.append(pairs)
    return *splits, names or [f"class {index}" for index in range(largest + 1)]


def largest_class(image_path: Path, mask_path: Path, num_classes: int) -> int:
    """Return the largest class in a mask that fits its image; without `num_classes` any below 255 serves."""
    if not mask_path.is_file():
        raise SystemExit(f"--data: {image_path} has no mask {mask_path}")
    try:
        with Image.open(image_path) as image, Image.open(mask_path) as mask:
            sizes = ["{}x{}".format(*picture.size) for picture in (mask, image)]
            if mask.mode not in ("L", "P"):
                raise SystemExit(f"--data: {mask_path} has the mode {mask.mode}; a mask has one byte a pixel")
            values = numpy.unique(numpy.asarray(mask))
    except (OSError, UnidentifiedImageError) as error:
        raise SystemExit(f"--data: {mask_path} or its image cannot be read: {error}") from error
    if sizes[0] != sizes[1]:
        raise SystemExit(f"--data: {mask_path} has {sizes[0]} pixels, but its image {sizes[1]}")
    largest = int(values[values != IGNORED].max(initial=0))
    if num_classes and largest >= num_classes:
        named = f"classes.txt names {num_classes} classes"
        raise SystemExit(f"--data: {mask_path} has the value {largest}, but {named}")
    return largest


def make_scenes(number: int, seed: int) -> tuple[list[tuple], list[tuple], list[str]]:
    """Return made-up scenes that train and that validate (see the top), and the classes' names."""
    from sklearn.datasets import load_sample_images

    photos, splits = [photo.astype(float) for photo in load_sample_images().images], []
    for split, count in enumerate((number, max(number // 4, 1))):
        random = numpy.random.default_rng([seed, split])
        halves = [numpy.array_split(photo, 2, axis=1)[split] for photo in photos]
        splits.append([make_scene(random, halves) for _ in range(count)])
    return *splits, ["background", *SHAPES]


def make_scene(random, photos: list[numpy.ndarray], size: int = 48) -> tuple:
    """Return one image `(size, size, 3)` and its mask `(size, size)`, bytes."""

    def piece() -> numpy.ndarray:
        photo = photos[random.integers(len(photos))]
        top, left = (random.integers(side - 2 * size) for side in photo.shape[:2])
        return photo[top : top + 2 * size : 2, left : left + 2 * size : 2]

    scene, mask = piece().copy(), numpy.zeros((size, size), dtype="uint8")
    rows, columns = numpy.mgrid[:size, :size]
    for _ in range(random.integers(2, 5)):
        kind, radius = random.integers(len(SHAPES)), random.uniform(6, 11)
        y, x = rows - random.uniform(radius, size - radius), columns - random.uniform(radius, size - radius)
        distance = (
            numpy.hypot(y, x),
            numpy.maximum(abs(y), abs(x)) * 1.15,
            numpy.maximum(abs(x) * 1.7 - y, 1.7 * y),
            numpy.minimum(numpy.maximum(abs(y), 3 * abs(x)), numpy.maximum(abs(x), 3 * abs(y))),
        )[kind]
        inside = distance < radius
        if not mask[inside].any():  # shapes do not cover each other
            scene[inside] = 0.4 * piece()[inside] + 0.6 * random.integers(0, 256, 3)
            mask[inside] = 1 + kind
    return scene.round().astype("uint8"), mask


def build(settings: Settings, kind: str, names: list[str]) -> UperNetForSemanticSegmentation:
    """Return UperNet on a FlashKAT or, of the same size, on a ViT.

    Raises:
        SystemExit: the model cannot be loaded, or its patches do not divide the images.
    """
    try:
        if settings.model:
            base = FlashKATConfig.from_pretrained(settings.model)
        else:
            base = FlashKATConfig.from_size("micro", image_size=settings.image_size)
    except (OSError, ValueError, StrictDataclassError) as error:
        flag, text = "--model" if settings.model else "--image_size", one_line(error.__cause__ or error)
        raise SystemExit(f"{flag}: {text}") from error
    patch = base.patch_size
    if not isinstance(patch, int) or settings.image_size % patch:
        raise SystemExit(f"--image_size: {settings.image_size} must be a multiple of the patches' {patch}")
    stages = [round(base.num_hidden_layers * part / 4) for part in (1, 2, 3, 4)]
    if kind == "flashkat":
        base.out_indices = stages
        backbone_config = base
    else:
        shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
        sizes = {name: getattr(base, name) for name in shared}
        ratio = base.intermediate_size // base.hidden_size
        backbone_config = Dinov2Config(**sizes, mlp_ratio=ratio, out_indices=stages, use_mask_token=False)
    config = UperNetConfig(
        backbone_config=backbone_config,
        hidden_size=settings.head_size,
        auxiliary_in_channels=base.hidden_size,
        auxiliary_channels=settings.head_size,
        loss_ignore_index=IGNORED,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = UperNetForSemanticSegmentation(config)
    if kind == "flashkat" and settings.model:
        model.backbone = FlashKATBackbone.from_pretrained(settings.model, out_indices=stages)
    return model


def most_likely(outputs, labels: torch.Tensor) -> torch.Tensor:
    """Return the class of each pixel, out of what the model returns; the rest is not kept."""
    return (outputs[0] if isinstance(outputs, tuple) else outputs).argmax(1).to(torch.uint8)


def scores(outputs, names: list[str]) -> dict[str, float]:
    """Return the IoU of each class that occurs, their mean, and the part of the pixels that is right."""
    counted, number = outputs.label_ids != IGNORED, len(names)
    pairs = outputs.label_ids[counted].astype("int64") * number + outputs.predictions[counted]
    matrix = numpy.bincount(pairs, minlength=number**2).reshape(number, number)
    hits, pixels = matrix.diagonal(), matrix.sum(1)
    iou = {
        f"iou {name}": hits[i] / (pixels[i] + matrix[:, i].sum() - hits[i])
        for i, name in enumerate(names)
        if pixels[i]
    }
    return {"mean_iou": sum(iou.values()) / len(iou), "accuracy": hits.sum() / pixels.sum(), **iou}


def learn(settings: Settings, kind: str, train: Scenes, val: Scenes, names: list[str]) -> tuple:
    """Train one of the two and save it; return its scores and masks, and whether this process writes."""
    set_seed(settings.seed)
    model, on_gpu = build(settings, kind, names), torch.cuda.is_available()
    arguments = TrainingArguments(
        str(settings.output / kind),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.05,
        bf16=on_gpu,
        dataloader_num_workers=2 if settings.data else 0,
        dataloader_pin_memory=on_gpu,
        save_strategy="no",
        logging_steps=100,
        disable_tqdm=True,
        report_to=[],
        seed=settings.seed,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        compute_metrics=partial(scores, names=names),
        preprocess_logits_for_metrics=most_likely,
    )
    trainer.train()
    result = trainer.predict(val)
    trainer.save_model()
    metrics = {name.removeprefix("test_"): float(value) for name, value in result.metrics.items()}
    metrics["parameters"] = model.num_parameters()
    return metrics, result.predictions, trainer.is_world_process_zero()


def draw(path: Path, val: Scenes, columns: dict[str, numpy.ndarray], num_classes: int) -> None:
    """Draw the first images, their masks, and what each model makes of them, a row for each image."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, width = min(6, len(val)), 2 + len(columns)
    figure, axes = pyplot.subplots(rows, width, figsize=(2.2 * width, 2.2 * rows), squeeze=False)
    for row in range(rows):
        item = val[row]
        image = (item["pixel_values"] * STD + MEAN).permute(1, 2, 0).clamp(0, 1)
        pictures = {"image": image, "mask": item["labels"].numpy()}
        pictures |= {name: masks[row] for name, masks in columns.items()}
        for axis, (name, picture) in zip(axes[row], pictures.items(), strict=True):
            shown = numpy.ma.masked_equal(picture, IGNORED) if name != "image" else picture
            axis.imshow(shown, cmap="tab20", vmin=0, vmax=max(num_classes, 20) - 1, interpolation="nearest")
            axis.set_axis_off()
            axis.set_title(name if row == 0 else "")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main(settings: Settings) -> None:
    """Check data and models, train, and write scores and pictures."""
    made = not settings.data
    pairs = make_scenes(settings.num_scenes, settings.seed) if made else read_folder(settings.data)
    names = pairs[2]
    train, val = Scenes(pairs[0], settings.image_size, flips=not made), Scenes(pairs[1], settings.image_size)
    kinds = ["flashkat", "vit"] if settings.twin else ["flashkat"]
    for kind in kinds:  # what cannot be built is said before anything learns
        build(settings, kind, names)
    print(f"{len(train)} images to train on, {len(val)} to validate, {len(names)} classes", flush=True)
    summary, masks = {}, {}
    for kind in kinds:
        summary[kind], masks[kind], writes = learn(settings, kind, train, val, names)
        iou, accuracy = (f"{summary[kind][name]:.1%}" for name in ("mean_iou", "accuracy"))
        print(f"{kind}: mean IoU {iou}, pixels {accuracy}", flush=True)
    if writes:
        (settings.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        draw(settings.output / "masks.png", val, masks, len(names))


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
