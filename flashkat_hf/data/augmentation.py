"""From an opened image to the model's input: timm's transforms, with an image processor's settings.

Evaluation is timm's evaluation transform to the pixel. Training is timm's training transform with the
recipe's values, or small moves for digits and other signs. `docs/data.md` says how `pipeline` differs.
"""

from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor, nn

from ..messages import extra
from .gpu.augmentation import BatchAugmentation
from .gpu.evaluation import BatchEvaluation, Evaluation, EvaluationPart, levels_of
from .gpu.planning import MovedPart, WorkerPart
from .gpu.shifting import SHIFT, Shifting, held_size
from .options import SIGNS, Augmentation
from .samples import DataError, Transform

__all__ = ["SIGNS", "Augmentation", "batch_transform", "evaluation_transform", "middle", "training_transform"]


MOST_ASPECT = 64  # longer side over shorter side of an image that is resized whole


def training_transform(processor, augmentation: Augmentation) -> Transform:
    """Return the recipe's augmentation, which draws from the global generators of random, numpy and torch.

    Args:
        processor: gives the crop size, mean and standard deviation.
        augmentation: the recipe.

    Returns:
        A function of an RGB image that returns `(channels, height, width)` float32; where `on_device` leaves
        work to `batch_transform`, of a `Sample`, that returns what that takes, or with "everything" of an
        image, that returns its pixels, uint8. For one channel, images become grey before anything else, and
        all of it is done here.
    """
    size = (processor.crop_size["height"], processor.crop_size["width"])
    if augmentation.on_device == "everything" and not _done_by_workers(processor, augmentation):
        center = extra("torchvision.transforms").CenterCrop(held_size(size))  # black beyond the image
        return levels_of([_scaled(processor), center])
    parts = _timm_transforms(processor, augmentation, size)
    if augmentation.moved:
        parts = _moves(processor, augmentation, size), *parts[1:]
    if not _done_by_workers(processor, augmentation):
        decode = augmentation.on_device == "decoding"
        return MovedPart(parts, size) if augmentation.moved else WorkerPart(parts, size, decode)
    grey = num_channels(processor) == 1
    steps = (_grey, *parts, _first_channel) if grey else parts
    return extra("torchvision.transforms").Compose(steps)


def num_channels(processor) -> int:
    """Return the channels of a processor's images.

    Raises:
        ValueError: image files have no such number.
    """
    count = len(getattr(processor, "image_mean", None) or (0, 0, 0))
    if count not in (1, 3):
        raise ValueError(f"the model takes images of {count} channels, but image files have 1 or 3")
    return count


def _done_by_workers(processor, augmentation: Augmentation) -> bool:
    return augmentation.on_device in ("auto", "nothing") or num_channels(processor) == 1


def _grey(image: Image.Image) -> Image.Image:
    """Return an image without its colours, still in three channels, which timm's operations expect."""
    return image.convert("L").convert("RGB")


def _first_channel(pixels: Tensor) -> Tensor:
    return pixels[:1]


def _timm_transforms(processor, augmentation: Augmentation, size: tuple[int, int]) -> tuple[Any, Any, Any]:
    """Return timm's three transforms: crop and flip; RandAugment; normalisation and erasing."""
    mean, std = (
        tuple(values) * (3 if len(values) == 1 else 1)  # grey has three equal channels here
        for values in (processor.image_mean, processor.image_std)
    )
    parts = extra("timm.data").create_transform(
        size,
        is_training=True,
        scale=augmentation.crop_area,
        ratio=augmentation.crop_ratio,
        interpolation=augmentation.interpolation,
        hflip=augmentation.flip,
        auto_augment=augmentation.rand_augment,
        color_jitter=augmentation.color_jitter or None,
        mean=mean,
        std=std,
        re_prob=augmentation.erasing,
        re_mode="pixel",
        separate=True,
    )
    steps = (step for part in parts for step in part.transforms)
    for operation in (operation for step in steps for operation in getattr(step, "ops", ())):
        if operation.aug_fn.__name__ == "posterize":
            operation.aug_fn = posterize
    return parts


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Posterize as timm does; black for no bits, which RandAugment can ask for and Pillow 13 refuses."""
    posterized = extra("timm.data.auto_augment").posterize
    return posterized(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


def _moves(processor, augmentation: Augmentation, size: tuple[int, int]) -> Transform:
    """Scale as evaluation does, move a little, and mirror."""
    transforms = extra("torchvision.transforms")
    bilinear = transforms.InterpolationMode.BILINEAR
    moved = transforms.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=bilinear)
    if augmentation.crop == "shifts":  # by whole pixels, so that nothing is interpolated
        moved = transforms.RandomAffine(0, translate=(SHIFT, SHIFT))
    flip = transforms.RandomHorizontalFlip(augmentation.flip)
    return transforms.Compose([_scaled(processor), moved, transforms.CenterCrop(size), flip])


def _scaled(processor) -> "LimitedResize":
    """Return the resizing of training images that are used whole: to evaluation's size, bicubic."""
    return LimitedResize(_resized(processor), extra("torchvision.transforms").InterpolationMode.BICUBIC)


def batch_transform(processor, augmentation: Augmentation) -> nn.Module | None:
    """Return what is to be done with a whole batch, or None: then `training_transform` has done everything.

    Otherwise call the module, moved to the device, with each batch as `TrainBatches` gives it, on the CPU; it
    returns `{"pixel_values", "labels"}` on the device. For "everything" it is the `Shifting` that
    `HeldBatches` takes.
    """
    if _done_by_workers(processor, augmentation):
        return None
    size = (processor.crop_size["height"], processor.crop_size["width"])
    if augmentation.on_device == "everything":
        return Shifting(processor.image_mean, processor.image_std, size, augmentation.flip or 0.0)
    return BatchAugmentation(processor.image_mean, processor.image_std, size)


def evaluation_transform(processor) -> Transform:
    """Return what evaluation does: `(channels, height, width)` float32 of an RGB image.

    For a processor that resizes (to a shorter side, or to height and width), may crop the center, and
    normalises, this is timm's evaluation transform with the same settings. Another processor does its work
    itself.

    Raises:
        ValueError: as `num_channels`.
    """
    num_channels(processor)
    if _METHODS & vars(type(processor)).keys() or not all(hasattr(processor, name) for name in _SETTINGS):
        return partial(_process, processor)
    size, crop = processor.size or {}, processor.crop_size
    plain = processor.do_resize and processor.do_rescale and processor.do_normalize and not processor.do_pad
    plain = plain and not size.get("longest_edge") and processor.rescale_factor == 1 / 255
    resized = _resized(processor)
    if not plain or resized == (None, None):
        return partial(_process, processor)
    transforms = extra("torchvision.transforms")
    interpolation = transforms.InterpolationMode(Image.Resampling(int(processor.resample)).name.lower())
    cropped = [transforms.CenterCrop((crop["height"], crop["width"]))] if processor.do_center_crop else []
    normalised = [transforms.ToTensor(), transforms.Normalize(processor.image_mean, processor.image_std)]
    window = (crop["height"], crop["width"]) if processor.do_center_crop else None
    return transforms.Compose([LimitedResize(resized, interpolation, window), *cropped, *normalised])


def evaluation_in_batches(transform: Transform) -> tuple[EvaluationPart, BatchEvaluation] | None:
    """Return a worker's part of an evaluation transform and a device's, or None if it is none for a device.

    Args:
        transform: what `evaluation_transform` returned.
    """
    steps = getattr(transform, "transforms", [None])
    resize, normalise = steps[0], steps[-1]
    if not isinstance(resize, LimitedResize) or len(normalise.mean) != 3:
        return None
    filter_, to = resize.resize.interpolation.value, resize.resize.size
    size = resize.crop or (to if not isinstance(to, int) else None)
    if filter_ not in ("bilinear", "bicubic") or size is None:
        return None
    size = size[0], size[1]
    evaluation = Evaluation(to, size, filter_ == "bicubic", MOST_ASPECT, levels_of(steps[:-2]))
    return EvaluationPart(evaluation), BatchEvaluation(normalise.mean, normalise.std, size)


class LimitedResize:
    """torchvision's Resize to a shorter side or a size, which does not make what a center crop throws away.

    A long thin image would become huge: 20,000 x 1 pixels at a shorter side of 256 are 1.3 billion. Where one
    side is more than `MOST_ASPECT` times the other, the crop's part is cut out first, then resized.
    """

    def __init__(self, size: int | tuple[int, int], interpolation: Any, crop: tuple[int, int] | None = None):
        self.resize = extra("torchvision.transforms").Resize(size, interpolation)
        self.crop = crop

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the resized image, or the middle of one that is long and thin.

        Raises:
            DataError: one side is more than `MOST_ASPECT` times the other, and no crop follows.
        """
        size = self.resize.size
        if not isinstance(size, int) or max(image.size) <= MOST_ASPECT * min(image.size):
            return self.resize(image)
        if self.crop is None:
            raise too_long(image, size)
        short, long = sorted(image.size)
        axis, whole = image.size.index(long), size * long // short  # as torchvision rounds it
        part = min(self.crop[1 - axis], whole)
        scale = long / whole
        start = round((whole - part) / 2) * scale  # as torchvision rounds it
        margin = 4 * max(1.0, scale)  # pixels beside the part that its border is resized from
        low, high = max(0, int(start - margin)), min(long, int(start + part * scale + margin) + 1)
        first, last = start - low, start + part * scale - low
        resample = Image.Resampling[self.resize.interpolation.name]
        if axis == 0:
            strip = image.crop((low, 0, high, short))
            return strip.resize((part, size), resample, (first, 0, last, short))
        strip = image.crop((0, low, short, high))
        return strip.resize((size, part), resample, (0, first, short, last))


def too_long(image: Image.Image, side: int) -> DataError:
    """Return the error for a long thin image whose shorter side would become `side`, all of it."""
    long = side * max(image.size) // min(image.size)
    shape = f"{image.width} x {image.height} pixels would become {long} x {side}"
    return DataError(f"{shape}; one side may be at most {MOST_ASPECT} times the other")


def _resized(processor) -> Any:
    """Return what torchvision's Resize takes: the shorter side, or height and width."""
    size = processor.size or {}
    return size.get("shortest_edge") or (size.get("height"), size.get("width"))


# A processor whose class has one of these methods, or lacks one of these settings, does its work itself.
_METHODS = {"preprocess", "_preprocess", "resize", "center_crop", "rescale", "normalize"}
_SETTINGS = (
    "size", "crop_size", "do_pad", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "resample",
)  # fmt: skip


def _process(
    processor, image: Image.Image
) -> Tensor:  # of the module: workers started afresh can unpickle it
    return processor(middle(image, processor), return_tensors="pt")["pixel_values"][0]


def middle(image: Image.Image, processor) -> Image.Image:
    """Return what a processor's center crop can see of a long thin image, and more; any other image as it is.

    For processors that do their work themselves: what they would resize is no larger than it has to be.

    Raises:
        DataError: one side is more than `MOST_ASPECT` times the other, and no crop follows.
        ValueError: as `num_channels`.
    """
    num_channels(processor)
    size, (short, long) = processor.size or {}, sorted(image.size)
    side = size.get("shortest_edge") if getattr(processor, "do_resize", True) else None
    if not side or size.get("longest_edge") or long <= MOST_ASPECT * short:
        return image
    if not getattr(processor, "do_center_crop", False):
        raise too_long(image, side)
    axis = image.size.index(long)
    crop = processor.crop_size["height" if axis else "width"]
    kept = short * (8 + -(-crop // side))
    kept += (long - kept) % 2  # the middle stays where it is
    start = max(0, (long - kept) // 2)
    box = (start, 0, long - start, short) if axis == 0 else (0, start, short, long - start)
    return image.crop(box)
