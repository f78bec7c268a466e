"""The image processor of a checkpoint: ViT's with KAT's evaluation transform, or another that fits."""

import math
from collections.abc import Sequence
from typing import Any

import numpy
from PIL.Image import Resampling
from PIL.Image import new as new_image
from transformers.image_utils import SizeDict
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils.import_utils import is_torchvision_available

from ..model.configuration_flashkat import pair

OWN_WORK = {"preprocess", "_preprocess", "resize", "center_crop", "rescale", "normalize"}
MOST_TIMES = 16  # what an image may be resized to, as a multiple of what the model takes
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey: ITU-R 601-2, as Pillow's mode L


class GreyViTImageProcessor(ViTImageProcessorPil):
    """ViT's image processor for a model of one channel: colours become grey before they are resized."""

    def _preprocess(self, images, *args, **kwargs):
        grey = [numpy.rint(numpy.tensordot(LUMA, image, 1)).astype(image.dtype)[None] for image in images]
        return super()._preprocess(grey, *args, **kwargs)


IMAGE_PROCESSOR_CLASSES: dict[str, type] = {"pil": ViTImageProcessorPil}
if is_torchvision_available():
    from transformers.models.vit.image_processing_vit import ViTImageProcessor

    IMAGE_PROCESSOR_CLASSES["torchvision"] = ViTImageProcessor


def make_image_processor(
    image_size: int | Sequence[int] = 224,
    crop: float = 0.875,
    image_mean: tuple[float, ...] = tuple(IMAGENET_DEFAULT_MEAN),
    image_std: tuple[float, ...] = tuple(IMAGENET_DEFAULT_STD),
    num_channels: int = 3,
) -> Any:
    """Make ViT's image processor: shorter side to `image_size / crop` pixels, bicubic, centre crop, RGB.

    The defaults are KAT's evaluation: shorter side 256, crop 224, ImageNet statistics. With torchvision the
    processor works on tensors, without it on PIL images.

    Args:
        image_size: height and width of the result in pixels, one number or two. Two different ones: images
            are resized to them, divided by `crop`, whatever their proportions.
        crop: part of the shorter side that the crop keeps, in (0, 1].
        image_mean: mean of each channel, of pixels scaled to [0, 1].
        image_std: standard deviation of each channel.
        num_channels: of the model. 1: images become grey, by a class that this package registers. Others than
            1 and 3 are no files' images: arrays and tensors are taken as they are.

    Raises:
        ValueError: `crop` is not in (0, 1].
    """
    if not 0 < crop <= 1:
        raise ValueError(f"crop ({crop}) must be in (0, 1]")
    processor_class = IMAGE_PROCESSOR_CLASSES.get("torchvision", ViTImageProcessorPil)
    if num_channels == 1:
        processor_class = GreyViTImageProcessor
    if len({len(image_mean), len(image_std)} - {num_channels}):  # of another number of channels
        image_mean, image_std = (
            (sum(values) / len(values),) * num_channels for values in (image_mean, image_std)
        )
    height, width = pair(image_size)
    size = {"height": round(height / crop), "width": round(width / crop)}
    return processor_class(
        do_convert_rgb=num_channels in (1, 3),
        size={"shortest_edge": size["height"]} if height == width else size,
        resample=Resampling.BICUBIC,
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        image_mean=list(image_mean),
        image_std=list(image_std),
    )


def fit_processor(processor: Any, num_channels: int, image_size: int | Sequence[int]) -> None:
    """Hold an image processor against its model, and state what it does in one form.

    That form is the same function: pixels are divided by 255, each channel has a mean and a standard
    deviation (0 and 1 where nothing was normalised), and `crop_size` is the result's size, cropped or not.

    Args:
        processor: any image processor of transformers.
        num_channels: of the model; an image is passed through if there are images of so many channels.
        image_size: height and width that the model takes, in pixels, one number or two.

    Raises:
        ValueError: statistics that are not finite or have another number of channels; images of another size,
            or cropped from far larger ones.
    """
    sides = [side for side in dict(getattr(processor, "size", None) or {}).values() if side]
    largest = MOST_TIMES * max(*pair(image_size), 64)
    if not all(type(side) is int and 0 < side <= largest for side in sides):
        problem = f"its processor resizes to {sides}, but the model takes {image_size} pixels"
        raise ValueError(f"{problem}; up to {largest} are expected")
    if has_own_work(processor):
        _check_statistics(processor, num_channels)
    else:
        scale = processor.rescale_factor if processor.do_rescale else 1
        if not _are_numbers([scale]) or scale <= 0:
            raise ValueError(f"its processor has rescale_factor {scale!r}, which must be finite and positive")
        if not processor.do_normalize:
            processor.image_mean, processor.image_std = 0.0, 1.0
        _check_statistics(processor, num_channels)
        if not math.isclose(scale, 1 / 255):
            for name in ("image_mean", "image_std"):
                setattr(processor, name, [value / (255 * scale) for value in getattr(processor, name)])
        processor.do_rescale, processor.rescale_factor, processor.do_normalize = True, 1 / 255, True
    size = pair(image_size)
    if num_channels in (1, 3):
        image = new_image("RGB", (2 * size[1] + 16, 2 * size[0]))
        channels, height, width = processor(image, return_tensors="np")["pixel_values"][0].shape
        if (channels, height, width) != (num_channels, *size):
            made, taken = f"{_pixels(height, width)} pixels", _pixels(*size)
            if channels != num_channels:
                made, taken = f"{channels} channels and {made}", f"{num_channels} and {image_size}"
            raise ValueError(f"its processor makes images of {made}, but the model takes {taken}")
    if not getattr(processor, "do_center_crop", None):
        processor.crop_size = SizeDict(height=size[0], width=size[1])


def _pixels(height: int, width: int) -> str:
    return f"{height}" if height == width else f"{height}x{width}"


def resize_processor(processor: Any, image_size: int) -> None:
    """Let a processor of `fit_processor` make images of another size, what it crops away in proportion.

    Raises:
        ValueError: it works in a way of its own.
    """
    kind: type = type(processor)
    if has_own_work(processor) and kind is not GreyViTImageProcessor:
        raise ValueError(f"a {kind.__name__} cannot be set to another image size")
    crop = processor.crop_size
    scales = {
        side: image_size / crop["width" if side == "width" else "height"] for side in dict(processor.size)
    }
    sizes = {side: round(pixels * scales[side]) for side, pixels in dict(processor.size).items() if pixels}
    processor.size = SizeDict(**sizes)
    processor.crop_size = SizeDict(height=image_size, width=image_size)


def has_own_work(processor: Any) -> bool:
    """Tell whether a processor does something else than resize, crop, rescale and normalise as ViT's does."""
    settings = (
        "size",
        "do_resize",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
    )
    return bool(OWN_WORK & vars(type(processor)).keys()) or not all(hasattr(processor, x) for x in settings)


def _check_statistics(processor: Any, num_channels: int) -> None:
    """Make lists of mean and standard deviation, a number for each channel, and refuse others."""
    for name in ("image_mean", "image_std"):
        values = getattr(processor, name, None)
        if values is None and has_own_work(processor):
            continue
        values = [values] * num_channels if isinstance(values, int | float) else values
        values = list(values) if isinstance(values, tuple) else values  # as transformers holds them
        if not isinstance(values, list) or not _are_numbers(values):
            raise ValueError(f"its processor has {name} {values!r}, no finite numbers")
        if len(values) != num_channels:
            raise ValueError(
                f"its processor has {name} {values}, but the model takes {num_channels} channels"
            )
        if name == "image_std" and min(values) <= 0:
            raise ValueError(f"its processor has image_std {values}, which must be positive")
        setattr(processor, name, values)


def _are_numbers(values: Any) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)
