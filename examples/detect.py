"""Fine-tune a detection head, FCOS, on a FlashKAT backbone, and for comparison on a ViT backbone.

    python examples/detect.py                           # made-up scenes, under four minutes on two CPU cores
    python examples/detect.py --data street --model runs/kat-tiny --image_size 512
    accelerate launch examples/detect.py --data street --model runs/kat-tiny --image_size 512 --twin false

The folder of `--data` has train.json and val.json in COCO's format ("images", "annotations" with "bbox", and
"categories"), and the images in train/ and val/ by the names that the files give. Boxes that are marked as a
crowd are used neither for training nor for the score.

Without `--data` the example makes its own scenes: one to four of scikit-learn's handwritten digits, scaled
and coloured at random, on pieces of its two photographs. Training has one half of each photograph and four
fifths of the digits, validation the other half and the other digits.

The head is torchvision's FCOS, which needs no anchor boxes, on a simple feature pyramid (ViTDet's), which is
computed from the map of the last block alone. The trainer is that of `flashkat finetune`, to which the class
`Detection` below describes the task, so its flags can be used here: --resume, --ema_decay, --trackers and
others.

The output folder has a run in `flashkat` and, with `--twin`, one in `vit`; `Detector.from_pretrained` loads
the best/ of each. Beside them are `summary.json` with COCO's mean average precision (mAP), measured by
pycocotools (extra `detect`), and `boxes.png`. The ViT is transformers' Dinov2Backbone of the same width,
depth and number of heads. Both backbones start from random weights, unless `--model` names a checkpoint for
the FlashKAT, and both are trained by the same recipe.
"""

import contextlib
import io
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from coco_boxes import make_scenes, read_folder
from huggingface_hub import PyTorchModelHubMixin
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import nms
from torchvision.transforms import v2
from transformers import CONFIG_MAPPING, AutoImageProcessor
from two_backbones import (
    UNUSED,
    backbone_config,
    is_first_process,
    make_backbone,
    read_flags,
    train_each,
    whole_image_processor,
)

from flashkat_hf.data.options import Augmentation
from flashkat_hf.data.samples import ImageData, Sample, open_image
from flashkat_hf.files import read_json, to_json, write_text
from flashkat_hf.messages import extra, one_line
from flashkat_hf.model.backbone_flashkat import pyramid_level
from flashkat_hf.training.recipe import Settings
from flashkat_hf.training.task import as_they_are

LEVELS = {"pyramid2": 0.5, "pyramid3": 1, "pyramid4": 2}  # patches of a side that a pixel stands for
LEAST_STRIDE = 4  # pixels of the image that a pixel of a level stands for; finer levels are left out
SCENE_SIZE = 64  # pixels of the sides of made-up scenes
SHOWN_SCORE = 0.3  # least score of the boxes that are drawn


@dataclass(frozen=True)
class Flags:
    head_size: int = field(default=32, metadata={"help": "channels of the pyramid and the head, by 32"})
    num_scenes: int = field(
        default=800, metadata={"help": "made-up scenes to train on; a quarter more validate"}
    )
    twin: bool = field(default=True, metadata={"help": "train the same head on a ViT, too"})
    recipe: Path = field(
        default=Path(__file__).with_suffix(".yaml"), metadata={"help": "YAML file of settings"}
    )

    def __post_init__(self):
        if self.head_size <= 0 or self.head_size % 32:
            raise ValueError(f"--head_size: {self.head_size} must be a multiple of 32, for its group norms")
        if self.num_scenes <= 0:
            raise ValueError(f"--num_scenes: {self.num_scenes} must be positive")


def strides(patch_size: int) -> dict[str, int]:
    """Return the levels of the pyramid that serve patches of a size, and their strides in pixels."""
    sizes = {name: int(patch_size * part) for name, part in LEVELS.items()}
    return {name: size for name, size in sizes.items() if size >= LEAST_STRIDE}


class Pyramid(nn.Module):
    """The maps of a backbone as torchvision wants them; a ViT's last one goes through the pyramid first."""

    def __init__(self, backbone: nn.Module, channels: int):
        super().__init__()
        self.backbone = backbone
        self.out_channels = channels
        self.names = list(strides(backbone.config.patch_size))
        width, self.levels = backbone.config.hidden_size, nn.ModuleList()
        if backbone.config.model_type != "flashkat":  # which has the same in itself
            self.levels.extend(pyramid_level(name, width, channels, 1e-6) for name in self.names)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.backbone(images).feature_maps
        maps = [level(maps[0]) for level in self.levels] or maps
        return OrderedDict(zip(self.names, maps, strict=True))


class Detector(nn.Module, PyTorchModelHubMixin):
    """FCOS on a backbone, as the trainer calls it; `from_pretrained` and `push_to_hub` know it.

    Args:
        backbone: a backbone's config as a dictionary.
        id2label: the classes' names.
        head_size: channels of pyramid and head.
        image_size: height and width of the images.
    """

    def __init__(self, backbone: dict[str, Any], id2label: dict[str, str], head_size: int, image_size: int):
        super().__init__()
        config = CONFIG_MAPPING[backbone["model_type"]].from_dict(backbone)
        self.config = SimpleNamespace(num_labels=len(id2label))  # which the trainer compares with the data
        edges = tuple((stride,) for stride in strides(config.patch_size).values())
        self.detector = FCOS(
            Pyramid(make_backbone(Settings(), config), head_size),
            len(id2label),
            image_mean=[0.0] * 3,  # the image processor has normalised already
            image_std=[1.0] * 3,
            fixed_size=(image_size, image_size),
            size_divisible=1,
            anchor_generator=AnchorGenerator(edges, ((1.0,),) * len(edges)),
            score_thresh=0.05,
        )

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        """Return an object with the loss or, without labels, a list of boxes, scores and labels.

        Args:
            pixel_values: `(batch, 3, height, width)`, normalised.
            labels: `(batch, boxes, 5)`: left, top, right, bottom in pixels, and the number of the class;
                -1 where there is no box.
        """
        if labels is None:
            return self.detector(list(pixel_values))
        targets = [
            {"boxes": rows[rows[:, 4] >= 0][:, :4], "labels": rows[rows[:, 4] >= 0][:, 4].long()}
            for rows in labels
        ]
        return SimpleNamespace(loss=sum(self.detector(list(pixel_values), targets).values()))


class BoxedImage:
    """The transform of a sample: image and boxes scaled together, and mirrored together by chance."""

    takes_sample = True

    def __init__(self, processor: Any, flip: float):
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.Resize((processor.crop_size["height"], processor.crop_size["width"])),
                v2.RandomHorizontalFlip(flip),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(processor.image_mean, processor.image_std),
            ]
        )

    def __call__(self, sample: Sample) -> dict[str, Tensor]:
        image, rows = open_image(sample.image, sample.name), torch.as_tensor(sample.label)
        boxes = tv_tensors.BoundingBoxes(rows[:, :4], format="XYXY", canvas_size=image.size[::-1])
        pixels, boxes = self.transform(image, boxes)
        labels = torch.cat((boxes.as_subclass(Tensor), rows[:, 4:]), 1)
        return {"pixel_values": pixels.as_subclass(Tensor), "labels": labels}


class MeanPrecision:
    """COCO's mean average precision, by pycocotools; see `Scores` in the trainer."""

    def __init__(self, accelerator: Accelerator, num_classes: int):
        self.accelerator = accelerator
        self.num_classes = num_classes
        self.images: list[tuple[list, list]] = []  # true and found boxes, a row each

    def add(self, outputs: Any, labels: Tensor) -> None:
        for found, rows in zip(outputs, labels, strict=True):
            columns = found["boxes"], found["labels"][:, None], found["scores"][:, None]
            kept = torch.cat([column.cpu().float() for column in columns], 1)
            self.images.append((rows[rows[:, 4] >= 0].tolist(), kept.tolist()))

    def result(self) -> dict[str, Any]:
        images = gather_object(self.images)
        if not images:
            raise ValueError("there are no images to evaluate")
        return {**mean_precision(images, self.num_classes), "count": len(images)}


def mean_precision(images: list[tuple[list, list]], num_classes: int) -> dict[str, float]:
    """Return COCO's mAP, over thresholds of IoU from 0.5 to 0.95, and that at 0.5.

    Args:
        images: for each, rows of true boxes (left, top, right, bottom, class) and of found ones, which have
            their score behind.
        num_classes: of the data.
    """
    coco, evaluation = extra("pycocotools.coco", "detect"), extra("pycocotools.cocoeval", "detect")

    def rows(which: int) -> list[dict[str, Any]]:
        boxes = [(number, row) for number, pair in enumerate(images) for row in pair[which]]
        return [
            {
                "id": index,
                "image_id": number,
                "category_id": int(row[4]),
                "bbox": [row[0], row[1], row[2] - row[0], row[3] - row[1]],
                "area": (row[2] - row[0]) * (row[3] - row[1]),
                "iscrowd": 0,
                "score": row[-1],
            }
            for index, (number, row) in enumerate(boxes, start=1)
        ]

    true, found = coco.COCO(), rows(1)
    if not found:
        return {"map": 0.0, "map_50": 0.0}
    true.dataset = {
        "images": [{"id": number} for number in range(len(images))],
        "categories": [{"id": number} for number in range(num_classes)],
        "annotations": rows(0),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        true.createIndex()
        evaluated = evaluation.COCOeval(true, true.loadRes(found), "bbox")
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
    return {"map": max(0.0, float(evaluated.stats[0])), "map_50": max(0.0, float(evaluated.stats[1]))}


@dataclass
class Detection:
    """The boxes of the things in an image, as a task of the trainer (`flashkat_hf/training/task.py`)."""

    num_scenes: int = 0
    num_classes: int = 0
    names: Mapping[str, str] = field(default_factory=lambda: {"map": "mAP", "map_50": "mAP at IoU 0.5"})
    unused: tuple[str, ...] = UNUSED

    def open_data(self, settings: Settings, rank: int, world_size: int) -> ImageData:
        folder = Path(settings.data) if settings.data else None
        data = read_folder(folder) if folder else make_scenes(self.num_scenes, settings.seed, SCENE_SIZE)
        self.num_classes = len(data.class_names)
        return data

    def transforms(self, processor: Any, augmentation: Augmentation) -> tuple:
        return BoxedImage(processor, augmentation.flip), BoxedImage(processor, 0.0), None

    def mixing(self, settings: Settings, num_labels: int) -> Any:
        return as_they_are

    def scores(self, accelerator: Accelerator) -> MeanPrecision:
        return MeanPrecision(accelerator, self.num_classes)


def build(flags: Flags, settings: Settings, names: list[str], kind: str) -> tuple[Detector, Any]:
    """Return the detector on a FlashKAT or, of the same size, on a ViT, and its image processor.

    Raises:
        ValueError: the model cannot be loaded, or its patches do not divide the images.
    """
    config = backbone_config(settings, kind, SCENE_SIZE)
    if kind == "flashkat":
        levels = {"out_features": list(strides(config.patch_size)), "pyramid_channels": flags.head_size}
        config = type(config).from_dict(config.to_dict() | levels)
    size = settings.image_size or config.image_size
    labels = {str(index): name for index, name in enumerate(names)}
    model = Detector(config.to_dict(), labels, flags.head_size, size)
    if settings.model and kind == "flashkat":
        model.detector.backbone.backbone = make_backbone(settings, config)
    if settings.gradient_checkpointing:
        model.detector.backbone.backbone.gradient_checkpointing_enable()
    return model, whole_image_processor(size)


def shown(found: dict[str, Tensor]) -> list[tuple[list[float], int, float]]:
    """Return boxes, classes and scores to draw: at each place the likeliest class, if it is likely enough."""
    kept = nms(found["boxes"], found["scores"], 0.5)
    rows = zip(*(found[name][kept].tolist() for name in ("boxes", "labels", "scores")), strict=True)
    return [row for row in rows if row[2] >= SHOWN_SCORE]


def draw(path: Path, data: ImageData, folders: dict[str, Path]) -> None:
    """Draw the first images with their boxes and with those of each model, a row for each image."""
    columns: dict[str, list] = {"boxes": [], **{kind: [] for kind in folders}}
    number = min(6, len(data.test))
    for index in range(number):
        columns["boxes"].append([(*row, None) for row in data.test[index].label.tolist() if row[4] >= 0])
    for kind, folder in folders.items():
        with contextlib.redirect_stdout(io.StringIO()):  # it says where it loads from
            model = Detector.from_pretrained(folder).eval()
        processor = AutoImageProcessor.from_pretrained(folder)
        height, width = processor.crop_size["height"], processor.crop_size["width"]
        for index in range(number):
            sample = data.test[index]
            image = open_image(sample.image)
            with torch.no_grad():
                (found,) = model(BoxedImage(processor, 0.0)(sample)["pixel_values"][None])
            found["boxes"] *= torch.tensor([image.width / width, image.height / height] * 2)
            columns[kind].append([(*box, label, score) for box, label, score in shown(found)])
    figure = Figure(figsize=(2.6 * len(columns), 2.6 * number), layout="tight")
    axes = figure.subplots(number, len(columns), squeeze=False)
    for row in range(number):
        for axis, (name, boxes) in zip(axes[row], columns.items(), strict=True):
            axis.imshow(open_image(data.test[row].image))
            axis.set_axis_off()
            axis.set_title(name if row == 0 else "")
            for left, top, right, bottom, label, score in boxes[row]:
                frame = Rectangle(
                    (left, top), right - left, bottom - top, fill=False, edgecolor="lime", lw=1.5
                )
                axis.add_patch(frame)
                text = data.class_names[int(label)] + ("" if score is None else f" {score:.0%}")
                axis.text(left, top, text, color="black", backgroundcolor="lime", fontsize=6, va="bottom")
    figure.savefig(path, dpi=80)


def main() -> None:
    """Check data and models, train, and write scores and pictures."""
    try:
        flags, settings = read_flags(Flags, __doc__ or "")
        extra("pycocotools.cocoeval", "detect")
        task = Detection(flags.num_scenes)
        folders = train_each(settings, task, partial(build, flags), flags.twin)
        if is_first_process():
            summary = {kind: read_json(folder / "summary.json") for kind, folder in folders.items()}
            write_text(settings.output / "summary.json", to_json(summary))
            draw(settings.output / "boxes.png", task.open_data(settings, 0, 1), folders)
            for kind, result in summary.items():
                print(f"{kind}: mAP {result['map']:.1%}, at IoU 0.5 {result['map_50']:.1%}")
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"detect.py: {one_line(error)}") from error


if __name__ == "__main__":
    main()
