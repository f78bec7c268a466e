"""From an opened image to the model's input: timm's transforms, with the image processor's sizes and statistics.

Evaluation is timm's evaluation transform to the pixel. Training is timm's training transform with the recipe's values,
or small moves for digits and other signs. `docs/data.md` says how `pipeline` differs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor, nn

from .images import extra

Transform = Callable[[Any], Any]
CROPS, INTERPOLATIONS = ("random", "moves"), ("random", "bilinear", "bicubic")


@dataclass(frozen=True)
class Augmentation:
    """What training does to an image; the defaults are KAT's recipe.

    Attributes:
        crop: "random": a random part of the image, resized. "moves": shifts of up to a tenth, turns of up to 10 degrees
            and scalings of up to a tenth, for digits and other signs; the next three fields have no meaning then.
        crop_area: least and largest part of the image's area that a crop keeps.
        crop_ratio: least and largest width / height of a crop.
        interpolation: "bilinear", "bicubic", or "random": one of these two for each image.
        flip: probability of a mirror image.
        rand_augment: timm's RandAugment, as its configuration string; None for none.
        color_jitter: strength for brightness, contrast and saturation; timm leaves it out beside RandAugment.
        erasing: probability that a box of 0.02 to 1/3 of the area becomes noise.
    """

    crop: str = "random"
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "random"
    flip: float = 0.5
    rand_augment: str | None = "rand-m9-mstd0.5"
    color_jitter: float = 0.0
    erasing: float = 0.25

    def __post_init__(self):
        for name, known in (("crop", CROPS), ("interpolation", INTERPOLATIONS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")
        for name, largest in (("crop_area", 1.0), ("crop_ratio", float("inf"))):
            low, high = getattr(self, name)
            if not 0 < low <= high <= largest:
                raise ValueError(f"{name} ({low}, {high}) must be two numbers above 0 and up to {largest}, least first")
            object.__setattr__(self, name, (float(low), float(high)))  # YAML has lists
        for name in ("flip", "erasing"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} ({value}) must be a probability")
        if self.color_jitter < 0:
            raise ValueError(f"color_jitter ({self.color_jitter}) must not be negative")
        if self.rand_augment:
            _check_rand_augment(self.rand_augment)


SIGNS = Augmentation(crop="moves", flip=0.0, rand_augment=None, erasing=0.0)  # for digits: never mirrored


def _check_rand_augment(config: str) -> None:
    if not config.startswith("rand-"):
        raise ValueError(f"rand_augment {config!r} must be timm's, such as 'rand-m9-mstd0.5'")
    try:
        extra("timm.data.auto_augment").rand_augment_transform(config, {})
    except (AssertionError, ValueError) as error:
        raise ValueError(f"rand_augment {config!r} is not timm's form, such as 'rand-m9-mstd0.5'") from error


def training_transform(processor, augmentation: Augmentation) -> Transform:
    """The recipe's augmentation; draws from the global generators of random, numpy and torch.

    Args:
        processor: gives the crop size, mean and standard deviation.
        augmentation: what is done.

    Returns:
        A function of an RGB image that returns `(channels, height, width)` float32.
    """
    size = (processor.crop_size["height"], processor.crop_size["width"])
    if augmentation.crop == "moves":
        return _moves(processor, augmentation, size)
    return extra("timm.data").create_transform(
        size,
        is_training=True,
        scale=augmentation.crop_area,
        ratio=augmentation.crop_ratio,
        interpolation=augmentation.interpolation,
        hflip=augmentation.flip,
        auto_augment=augmentation.rand_augment,
        color_jitter=augmentation.color_jitter or None,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        re_prob=augmentation.erasing,
        re_mode="pixel",
    )


def _moves(processor, augmentation: Augmentation, size: tuple[int, int]) -> Transform:
    """Scaled as evaluation scales, moved a little, then as the recipe goes on."""
    transforms, timm = extra("torchvision.transforms"), extra("timm.data")
    bilinear, bicubic = transforms.InterpolationMode.BILINEAR, transforms.InterpolationMode.BICUBIC
    edge = processor.size["shortest_edge"]
    moved = transforms.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=bilinear)
    _, augment, to_tensor = timm.create_transform(
        size,
        is_training=True,
        auto_augment=augmentation.rand_augment,
        color_jitter=augmentation.color_jitter or None,
        interpolation=augmentation.interpolation,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        re_prob=augmentation.erasing,
        re_mode="pixel",
        separate=True,
    )
    flip = transforms.RandomHorizontalFlip(augmentation.flip)
    return transforms.Compose(
        [transforms.Resize(edge, bicubic), moved, transforms.CenterCrop(size), flip, augment, to_tensor]
    )


def batch_transform(processor, augmentation: Augmentation) -> nn.Module | None:
    """What is left to do with a whole batch on the device, or None: then `training_transform` has done everything.

    Otherwise the module takes a batch as `TrainBatches` gives it, on the CPU, and returns it on the device that the
    module is on, `pixel_values` normalised float32.
    """
    return None


def evaluation_transform(processor) -> Transform:
    """What evaluation sees: `(channels, height, width)` float32 of an RGB image.

    For a processor that resizes (to a shorter side, or to height and width), may crop the center, and normalises, this
    is timm's evaluation transform with the same settings. Another processor does its work itself.
    """
    size, crop = processor.size or {}, processor.crop_size
    plain = processor.do_resize and processor.do_rescale and processor.do_normalize and not processor.do_pad
    resized = size.get("shortest_edge") or (size.get("height"), size.get("width"))
    if not plain or size.get("longest_edge") or resized == (None, None) or processor.rescale_factor != 1 / 255:
        return partial(_process, processor)
    transforms = extra("torchvision.transforms")
    interpolation = transforms.InterpolationMode(Image.Resampling(int(processor.resample)).name.lower())
    cropped = [transforms.CenterCrop((crop["height"], crop["width"]))] if processor.do_center_crop else []
    normalised = [transforms.ToTensor(), transforms.Normalize(processor.image_mean, processor.image_std)]
    return transforms.Compose([transforms.Resize(resized, interpolation), *cropped, *normalised])


def _process(processor, image: Image.Image) -> Tensor:  # a module's function: workers started afresh can unpickle it
    return processor(image, return_tensors="pt")["pixel_values"][0]
