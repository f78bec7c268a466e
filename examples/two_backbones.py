"""Functions that segment.py and detect.py share: they read flags, build both backbones and train each."""

import copy
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy
from huggingface_hub.errors import StrictDataclassError
from transformers import BackboneMixin, Dinov2Backbone, Dinov2Config, HfArgumentParser
from transformers.utils import logging

from flashkat_hf import FlashKATBackbone, FlashKATConfig, make_image_processor
from flashkat_hf.messages import one_line
from flashkat_hf.training import train
from flashkat_hf.training.recipe import Settings, parse
from flashkat_hf.training.task import Task

KINDS = ("flashkat", "vit")
# settings of the trainer that mean nothing for masks and boxes: data, head, mixing, augmentation
UNUSED = (
    *("skip_corrupt", "streaming", "subset", "revision", "image_column", "label_column", "class_names"),
    *("train_split", "test_split", "train_size", "test_size", "shuffle_buffer"),
    *("head", "freeze_backbone", "lora_rank", "lora_modules", "mixup", "cutmix", "label_smoothing"),
    *("crop", "crop_area", "crop_ratio", "interpolation", "rand_augment", "color_jitter", "erasing"),
    "on_device",
)
Flags = TypeVar("Flags")


def read_flags(
    flags: type[Flags], text: str, arguments: Sequence[str] | None = None
) -> tuple[Flags, Settings]:
    """Return an example's own flags, and the settings of its run: all of `flashkat finetune` serve.

    Args:
        flags: a dataclass; its `recipe` is the example's file of settings.
        text: for `--help`.
        arguments: the command line; default: this process's.

    Raises:
        ValueError: in one line, for a flag that is unknown or a value that does not serve.
    """
    logging.set_verbosity_error()  # which weights are new to a backbone is no news
    logging.disable_progress_bar()
    parser = HfArgumentParser(flags, description=text, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    parser.epilog = "Further flags are those of `flashkat finetune`, such as --epochs, --resume, --ema_decay."
    own, others = parser.parse_args_into_dataclasses(
        sys.argv[1:] if arguments is None else list(arguments), True
    )
    recipe = ["--recipe", str(own.recipe)]
    return own, parse([*recipe, *others], "finetune")


def backbone_config(settings: Settings, kind: str, image_size: int, **features: Any) -> Any:
    """Return the config of a FlashKAT or, of the same width, depth and heads, of transformers' DINOv2.

    Args:
        settings: of the run; its model or its size.
        kind: in `KINDS`.
        image_size: height and width that are trained on where the settings say nothing.
        **features: fields of a backbone's config.

    Raises:
        ValueError: the model cannot be loaded, or its patches do not divide the images.
    """
    given = {"drop_path_rate": settings.drop_path}
    if not settings.model:
        given["image_size"] = settings.image_size or image_size
        chosen = {name: getattr(settings, name) for name in ("patch_size", "initializer")}
        given |= {name: value for name, value in chosen.items() if value}
    try:
        if settings.model:
            base = FlashKATConfig.from_pretrained(settings.model, **given)
        else:
            base = FlashKATConfig.from_size(str(settings.size), **given)
    except (OSError, ValueError, StrictDataclassError) as error:
        flag, text = "--model" if settings.model else "--image_size", one_line(error.__cause__ or error)
        raise ValueError(f"{flag}: {text}") from error
    size, patch = settings.image_size or base.image_size, base.patch_size
    if not isinstance(patch, int) or not isinstance(size, int) or size % patch:
        raise ValueError(f"--image_size: {size} must be a multiple of the patches' {patch}")
    if kind == "flashkat":
        return type(base).from_dict(base.to_dict() | features)
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "drop_path_rate")
    sizes = {name: getattr(base, name) for name in shared}
    ratio = base.intermediate_size // base.hidden_size
    return Dinov2Config(**sizes, image_size=size, mlp_ratio=ratio, use_mask_token=False, **features)


def make_backbone(settings: Settings, config: Any) -> BackboneMixin:
    """Return the backbone of a config: a FlashKAT with the weights of `--model`, if there is one."""
    if isinstance(config, Dinov2Config):
        return Dinov2Backbone(config)
    if settings.model:
        backbone = FlashKATBackbone.from_pretrained(settings.model, config=config)
        return backbone.float()
    return FlashKATBackbone(config)


def whole_image_processor(image_size: int) -> Any:
    """Return an image processor that scales whole images to a square, since targets have places in them."""
    processor = make_image_processor(image_size, 1.0)
    processor.size = type(processor.size)(height=image_size, width=image_size)
    processor.do_center_crop = False
    return processor


def train_each(
    settings: Settings, task: Task, build: Callable[[Settings, list[str], str], Any], twin: bool
) -> dict[str, Path]:
    """Train one model of each kind in folders of its own; return those of the best ones, by kind.

    Args:
        settings: the run's; `output` gets the folders.
        task: what is learned.
        build: makes a model of settings, class names and kind.
        twin: train a ViT, too.

    Raises:
        ValueError: in one line, before anything learns.
    """
    if twin and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--twin: several processes train one model; --twin false")
    kinds = KINDS if twin else KINDS[:1]
    names = task.open_data(settings, 0, 1).class_names
    for kind in kinds:  # what cannot be built is said before anything learns
        build(settings, names, kind)
    for kind in kinds:
        run = copy.deepcopy(settings)
        run.output = settings.output / kind
        train(run, task=task, build=lambda given, names, kind=kind: build(given, names, kind))
    return {kind: settings.output / kind / "best" for kind in kinds}


def photograph_pieces(split: int, size: int) -> Callable[[numpy.random.Generator], numpy.ndarray]:
    """Return a function that cuts `(size, size, 3)` floats out of one half of scikit-learn's photographs.

    Of each of the two photographs, split 0 has the left half and split 1 the right one.
    """
    from sklearn.datasets import load_sample_images

    photos = [
        numpy.array_split(photo.astype(float), 2, axis=1)[split] for photo in load_sample_images().images
    ]

    def piece(random: numpy.random.Generator) -> numpy.ndarray:
        photo = photos[random.integers(len(photos))]
        top, left = (random.integers(side - 2 * size) for side in photo.shape[:2])
        return photo[top : top + 2 * size : 2, left : left + 2 * size : 2].copy()

    return piece


def is_first_process() -> bool:
    """Tell whether this process writes what the processes have in common."""
    return os.environ.get("RANK", "0") == "0"
