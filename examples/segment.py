"""Fine-tune a segmentation head, UperNet, on a FlashKAT backbone, and for comparison on a ViT backbone.

    python examples/segment.py                           # made-up scenes, under four minutes on two CPU cores
    python examples/segment.py --data scenes --model runs/kat-tiny --image_size 512
    accelerate launch examples/segment.py --data scenes --model runs/kat-tiny --image_size 512 --twin false

The folder of `--data` has train/images, train/masks, val/images and val/masks. Each image has a mask with its
size and name, a PNG file in which each pixel is the number of a class, or 255 where it is not to count.
classes.txt names the classes, one in each line.

Without `--data` the example draws its own scenes: two to four discs, squares, triangles and crosses of any
colour, partly transparent, on pieces of scikit-learn's two photographs. Training has one half of each
photograph, validation the other.

The trainer is that of `flashkat finetune`, to which the class `Segmentation` below describes the task, so its
flags can be used here: --resume, --ema_decay, --trackers and others.

The output folder has a run in `flashkat` and, with `--twin`, one in `vit`; `from_pretrained` loads the best/
of each. Beside them are `summary.json` with the IoU of each class, and `masks.png`. The ViT is transformers'
Dinov2Backbone of the same width, depth and number of heads, a plain ViT with layer scale. Both backbones
start from random weights, unless `--model` names a checkpoint for the FlashKAT, and both are trained by the
same recipe.
"""

import hashlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import AutoImageProcessor, UperNetConfig, UperNetForSemanticSegmentation
from two_backbones import (
    UNUSED,
    backbone_config,
    is_first_process,
    make_backbone,
    photograph_pieces,
    read_flags,
    train_each,
    whole_image_processor,
)

from flashkat_hf.data.batches import EvalBatches
from flashkat_hf.data.options import Augmentation
from flashkat_hf.data.samples import IMAGE_SUFFIXES, DataError, Examples, ImageData, Sample
from flashkat_hf.files import to_json, write_text
from flashkat_hf.messages import one_line
from flashkat_hf.training.evaluation import measure
from flashkat_hf.training.recipe import Settings
from flashkat_hf.training.task import as_they_are

IGNORED = 255  # pixels of a mask that belong to nothing
SHAPES = ("disc", "square", "triangle", "cross")  # in made-up scenes
SCENE_SIZE = 48  # pixels of their sides


@dataclass(frozen=True)
class Flags:
    head_size: int = field(default=32, metadata={"help": "channels of the head; UperNet's own are 512"})
    num_scenes: int = field(
        default=1600, metadata={"help": "made-up scenes to train on; a quarter more validate"}
    )
    twin: bool = field(default=True, metadata={"help": "train the same head on a ViT, too"})
    recipe: Path = field(
        default=Path(__file__).with_suffix(".yaml"), metadata={"help": "YAML file of settings"}
    )

    def __post_init__(self):
        for name in ("head_size", "num_scenes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name}: {getattr(self, name)} must be positive")


class MaskedImage:
    """The transform of a sample: image and mask scaled together, and mirrored together by chance."""

    takes_sample = True

    def __init__(self, processor: Any, flip: float):
        size = (processor.crop_size["height"], processor.crop_size["width"])
        dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.Resize(size),  # of a mask without mixing its numbers
                v2.RandomHorizontalFlip(flip),
                v2.ToDtype(dtypes, scale=True),
                v2.Normalize(processor.image_mean, processor.image_std),
            ]
        )

    def __call__(self, sample: Sample) -> dict[str, Tensor]:
        try:
            image, mask = opened(sample.image).convert("RGB"), numpy.array(opened(sample.label))
        except OSError as error:
            raise DataError(f"cannot read the image {sample.name} or its mask: {error}") from error
        pixels, labels = self.transform(image, tv_tensors.Mask(mask))
        return {"pixel_values": pixels.as_subclass(Tensor), "labels": labels.as_subclass(Tensor)}


def opened(picture: str | Image.Image) -> Image.Image:
    return Image.open(picture) if isinstance(picture, str) else picture


class MeanIoU:
    """The intersection over union of each class, of all pixels together; see `Scores` in the trainer."""

    def __init__(self, accelerator: Accelerator, class_names: list[str]):
        number = len(class_names)
        self.accelerator = accelerator
        self.class_names = class_names
        self.matrix = torch.zeros(number, number, dtype=torch.int64, device=accelerator.device)
        self.count = torch.zeros((), dtype=torch.int64, device=accelerator.device)

    def add(self, outputs: Any, labels: Tensor) -> None:
        number, logits = len(self.class_names), outputs.logits
        labels = labels.to(logits.device)
        counted = labels != IGNORED
        pairs = labels[counted] * number + logits.argmax(1)[counted]
        self.matrix += torch.bincount(pairs, minlength=number**2).view(number, number)
        self.count += len(labels)

    def result(self) -> dict[str, Any]:
        matrix, count = (self.accelerator.reduce(part, "sum").cpu() for part in (self.matrix, self.count))
        hits, pixels = matrix.diagonal(), matrix.sum(1)
        if not pixels.sum():
            raise ValueError("there are no pixels to evaluate")
        iou = {
            name: (hits[i] / (pixels[i] + matrix[:, i].sum() - hits[i])).item()
            for i, name in enumerate(self.class_names)
            if pixels[i]
        }
        right = (hits.sum() / pixels.sum()).item()
        return {"mean_iou": sum(iou.values()) / len(iou), "pixels": right, "iou": iou, "count": count.item()}


@dataclass
class Segmentation:
    """The class of each pixel, as a task of the trainer (`flashkat_hf/training/task.py`)."""

    num_scenes: int = 0
    class_names: list[str] = field(default_factory=list)
    names: Mapping[str, str] = field(default_factory=lambda: {"mean_iou": "mean IoU", "pixels": "pixels"})
    unused: tuple[str, ...] = UNUSED

    def open_data(self, settings: Settings, rank: int, world_size: int) -> ImageData:
        data = (
            read_folder(Path(settings.data)) if settings.data else make_scenes(self.num_scenes, settings.seed)
        )
        self.class_names = data.class_names
        return data

    def transforms(self, processor: Any, augmentation: Augmentation) -> tuple:
        return MaskedImage(processor, augmentation.flip), MaskedImage(processor, 0.0), None

    def mixing(self, settings: Settings, num_labels: int) -> Any:
        return as_they_are

    def scores(self, accelerator: Accelerator) -> MeanIoU:
        return MeanIoU(accelerator, self.class_names)


def read_folder(folder: Path) -> ImageData:
    """Return the images and masks of a folder, and the classes' names.

    Raises:
        DataError: in one line: a folder, an image or a mask is missing, or a mask does not serve.
    """
    splits, largest, digest = [], 0, hashlib.sha256()
    listed = folder / "classes.txt"
    names = listed.read_text().splitlines() if listed.is_file() else []
    names = [name.strip() for name in names if name.strip()]
    for split in ("train", "val"):
        places = folder / split / "images", folder / split / "masks"
        for place in places:
            if not place.is_dir():
                raise DataError(f"--data: {place} is not a folder")
        images = sorted(path for path in places[0].iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        masks = [places[1] / f"{image.stem}.png" for image in images]
        for image, mask in zip(images, masks, strict=True):
            largest = max(largest, largest_class(image, mask, len(names)))
            digest.update(f"{split} {image.name} {image.stat().st_size}".encode() + mask.read_bytes())
        if not images:
            raise DataError(f"--data: {places[0]} holds no images")
        splits.append(Examples([str(path) for path in images], [str(path) for path in masks]))
    names = names or [f"class {index}" for index in range(largest + 1)]
    return ImageData(*splits, names, digest.hexdigest())


def largest_class(image_path: Path, mask_path: Path, num_classes: int) -> int:
    """Return the largest class in a mask that fits its image; without `num_classes` any below 255 serves."""
    if not mask_path.is_file():
        raise DataError(f"--data: {image_path} has no mask {mask_path}")
    try:
        with Image.open(image_path) as image, Image.open(mask_path) as mask:
            sizes = ["{}x{}".format(*picture.size) for picture in (mask, image)]
            if mask.mode not in ("L", "P"):
                raise DataError(f"--data: {mask_path} has the mode {mask.mode}; a mask has one byte a pixel")
            values = numpy.unique(numpy.asarray(mask))
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"--data: {mask_path} or its image cannot be read: {error}") from error
    if sizes[0] != sizes[1]:
        raise DataError(f"--data: {mask_path} has {sizes[0]} pixels, but its image {sizes[1]}")
    largest = int(values[values != IGNORED].max(initial=0))
    if num_classes and largest >= num_classes:
        named = f"classes.txt names {num_classes} classes"
        raise DataError(f"--data: {mask_path} has the value {largest}, but {named}")
    return largest


def make_scenes(number: int, seed: int) -> ImageData:
    """Return made-up scenes that train and that validate (see the top)."""
    splits, digest = [], hashlib.sha256()
    for split, count in enumerate((number, max(number // 4, 1))):
        random, piece = numpy.random.default_rng([seed, split]), photograph_pieces(split, SCENE_SIZE)
        pairs = [make_scene(random, piece) for _ in range(count)]
        digest.update(b"".join(part.tobytes() for pair in pairs for part in pair))
        splits.append(
            Examples(*([Image.fromarray(part) for part in parts] for parts in zip(*pairs, strict=True)))
        )
    return ImageData(*splits, ["background", *SHAPES], digest.hexdigest(), "made-up scenes")


def make_scene(random: numpy.random.Generator, piece: Any) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return one image `(size, size, 3)` and its mask `(size, size)`, bytes."""
    size = SCENE_SIZE
    scene, mask = piece(random), numpy.zeros((size, size), dtype="uint8")
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
            scene[inside] = 0.4 * piece(random)[inside] + 0.6 * random.integers(0, 256, 3)
            mask[inside] = 1 + kind
    return scene.round().astype("uint8"), mask


def build(flags: Flags, settings: Settings, names: list[str], kind: str) -> tuple:
    """Return UperNet on a FlashKAT or, of the same size, on a ViT, and its image processor.

    Raises:
        ValueError: the model cannot be loaded, or its patches do not divide the images.
    """
    plain = backbone_config(settings, "flashkat", SCENE_SIZE)
    stages = [round(plain.num_hidden_layers * part / 4) for part in (1, 2, 3, 4)]
    config = UperNetConfig(
        backbone_config=backbone_config(settings, kind, SCENE_SIZE, out_indices=stages),
        hidden_size=flags.head_size,
        auxiliary_in_channels=plain.hidden_size,
        auxiliary_channels=flags.head_size,
        loss_ignore_index=IGNORED,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone = make_backbone(settings, config.backbone_config)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, whole_image_processor(settings.image_size or plain.image_size)


def judge(folder: Path, data: ImageData, rows: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the scores of a saved model, and the masks `(height, width)` that it gives the first images."""
    model = UperNetForSemanticSegmentation.from_pretrained(folder)
    transform = MaskedImage(AutoImageProcessor.from_pretrained(folder), 0.0)
    accelerator, masks = Accelerator(cpu=True), []
    scores = MeanIoU(accelerator, data.class_names)
    with closing(EvalBatches(data.test, transform, batch_size=8)) as batches:
        result = measure(model, batches, accelerator, scores)
    with torch.no_grad():
        for index in range(rows):
            item = transform(data.test[index])
            masks.append(model(item["pixel_values"][None]).logits[0].argmax(0))
    return {**result, "parameters": model.num_parameters()}, masks


def draw(path: Path, data: ImageData, columns: dict[str, list[Tensor]]) -> None:
    """Draw the first images, their masks, and what each model makes of them, a row for each image."""
    rows, width = len(next(iter(columns.values()))), 2 + len(columns)
    figure = Figure(figsize=(2.2 * width, 2.2 * rows), layout="tight")
    axes = figure.subplots(rows, width, squeeze=False)
    for row in range(rows):
        image, mask, _ = data.test[row]
        pictures = {"image": opened(image).convert("RGB"), "mask": numpy.array(opened(mask))}
        pictures |= {name: masks[row].numpy() for name, masks in columns.items()}
        for axis, (name, picture) in zip(axes[row], pictures.items(), strict=True):
            shown = picture if name == "image" else numpy.ma.masked_equal(picture, IGNORED)
            most = max(len(data.class_names), 20) - 1
            axis.imshow(shown, cmap="tab20", vmin=0, vmax=most, interpolation="nearest")
            axis.set_axis_off()
            axis.set_title(name if row == 0 else "")
    figure.savefig(path, dpi=80)


def main() -> None:
    """Check data and models, train, and write scores and pictures."""
    try:
        flags, settings = read_flags(Flags, __doc__ or "")
        task = Segmentation(flags.num_scenes)
        folders = train_each(settings, task, partial(build, flags), flags.twin)
        if is_first_process():
            data = task.open_data(settings, 0, 1)
            judged = {kind: judge(folder, data, min(6, len(data.test))) for kind, folder in folders.items()}
            summary = {kind: result for kind, (result, _) in judged.items()}
            write_text(settings.output / "summary.json", to_json(summary))
            draw(settings.output / "masks.png", data, {kind: masks for kind, (_, masks) in judged.items()})
            for kind, result in summary.items():
                print(f"{kind}: mean IoU {result['mean_iou']:.1%}, pixels {result['pixels']:.1%}")
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"segment.py: {one_line(error)}") from error


if __name__ == "__main__":
    main()
