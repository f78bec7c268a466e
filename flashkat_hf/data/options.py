"""The options of augmentation; reading them needs no PyTorch."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..messages import extra

if TYPE_CHECKING:
    import torch

CHOICES = {
    "crop": ("auto", "random", "moves", "shifts"),
    "interpolation": ("random", "bilinear", "bicubic"),
    "on_device": ("auto", "nothing", "augmentation", "decoding", "everything"),
}


def option(default: Any, text: str) -> Any:
    """Return the field of an option, which holds all that is known of it: its default and help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images; the defaults are KAT's recipe, and each field says what it does."""

    crop: str = option(
        "random",
        "random: a random part of the image, resized; moves: shifts of up to a tenth, turns of up to 10 "
        "degrees and scalings of up to a tenth, for digits and signs; shifts: of up to a twentieth, no more; "
        "the next three have no meaning with these two; "
        "auto: by the size of the images",
    )
    crop_area: tuple[float, float] | None = option(
        (0.08, 1.0), "least and largest part of the area that a crop keeps; none: with the crop"
    )
    crop_ratio: tuple[float, float] = option((3 / 4, 4 / 3), "least and largest width / height of a crop")
    interpolation: str = option("random", "bilinear, bicubic, or random: one of these two for each image")
    flip: float | None = option(0.5, "probability of a mirror image; none: with the crop")
    rand_augment: str | None = option("rand-m9-mstd0.5", "timm's configuration of RandAugment, or none")
    color_jitter: float = option(
        0.0, "strength for brightness, contrast and saturation; timm leaves it out beside RandAugment"
    )
    erasing: float = option(0.25, "probability that a box of 0.02 to 1/3 of the area becomes noise")
    on_device: str = option(
        "auto",
        "what is done for whole batches. nothing: worker processes do everything, with PIL; augmentation: "
        "RandAugment, normalisation and erasing; decoding: that, and decoding and cropping JPEGs; "
        "everything: small images, which are read once and shifted on the device; auto: as much as the "
        "device and the recipe allow",
    )

    def __post_init__(self):
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")
        for name, largest in (("crop_area", 1.0), ("crop_ratio", float("inf"))):
            if getattr(self, name) is None:
                continue
            low, high = getattr(self, name)
            if not 0 < low <= high <= largest:
                raise ValueError(
                    f"{name} ({low}, {high}) must be two numbers above 0 and up to {largest}, least first"
                )
            object.__setattr__(self, name, (float(low), float(high)))  # YAML has lists
        for name in ("flip", "erasing"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} ({value}) must be a probability")
        if self.color_jitter < 0:
            raise ValueError(f"color_jitter ({self.color_jitter}) must not be negative")
        if self.rand_augment and self.rand_augment != type(self).rand_augment:  # importing timm takes seconds
            _check_rand_augment(self.rand_augment)
        if self.on_device == "decoding" and self.moved:
            raise ValueError(f"on_device 'decoding' does not know the crop {self.crop!r}; use 'augmentation'")
        if self.on_device == "everything" and self.beside_shifts:
            raise ValueError(
                "on_device 'everything' knows the crop 'shifts' and mirror images, "
                f"not {self.beside_shifts}; use 'auto'"
            )
        if self.on_device in ("augmentation", "decoding") and self.color_jitter:
            raise ValueError(f"on_device {self.on_device!r} does not know color_jitter; use 'nothing'")

    @property
    def moved(self) -> bool:
        """Return True if each image is used whole and moved a little, by the crops "moves" and "shifts"."""
        return self.crop in ("moves", "shifts")

    @property
    def beside_shifts(self) -> str:
        """Return the first of what is done to images beside shifting and mirroring them, or nothing."""
        if self.crop not in ("auto", "shifts"):
            return f"the crop {self.crop!r}"
        return next((name for name in ("rand_augment", "erasing", "color_jitter") if getattr(self, name)), "")

    def resolved(
        self, device: "torch.device", in_memory: bool, num_bytes: int | None = None
    ) -> "Augmentation":
        """Return the same with "auto" decided: as much as possible; else nothing for images in memory.

        Args:
            device: of the process.
            in_memory: whether the images lie in memory already.
            num_bytes: of all images that are trained on, at the model's size; None: they are a stream.

        Raises:
            ValueError: `on_device` asks for what the device cannot do.
        """
        from .gpu.augmentation import missing_for_kernels
        from .gpu.decoding import decodes
        from .gpu.planning import in_batches
        from .gpu.shifting import HELD_BYTES

        if self.on_device == "everything":
            if num_bytes is None:
                raise ValueError("on_device 'everything' holds all images, but a stream is read; use 'auto'")
            if num_bytes > HELD_BYTES:
                size = f"{num_bytes / 2**30:.1f}"
                raise ValueError(f"on_device 'everything' would hold {size} GiB, more than 1; use 'auto'")
            return self
        shifted, fits = self.crop == "shifts", num_bytes is not None and num_bytes <= HELD_BYTES
        if self.on_device == "auto" and device.type == "cuda" and shifted and fits and not self.beside_shifts:
            return replace(self, on_device="everything")
        missing = missing_for_kernels(device)
        if self.on_device != "auto":
            if self.on_device != "nothing" and missing:
                raise ValueError(f"on_device {self.on_device!r} needs {missing}; use 'nothing'")
            return self
        unknown = self.color_jitter or not in_batches(self.rand_augment)
        if device.type != "cuda" or missing or in_memory or unknown:
            return replace(self, on_device="nothing")
        decode = decodes(device) and not self.moved
        return replace(self, on_device="decoding" if decode else "augmentation")


SIGNS = Augmentation(crop="moves", flip=0.0, rand_augment=None, erasing=0.0)  # for digits: never mirrored
PHOTOGRAPHS = Augmentation(rand_augment=None, erasing=0.0)  # how they are fine-tuned: crops and mirrored ones
BY_THE_DATA = Augmentation("auto", None, flip=None, rand_augment=None, erasing=0.0)  # what the rule completes


def _check_rand_augment(config: str) -> None:
    if not config.startswith("rand-"):
        raise ValueError(f"rand_augment {config!r} must be timm's, such as 'rand-m9-mstd0.5'")
    try:
        extra("timm.data.auto_augment").rand_augment_transform(config, {})
    except (AssertionError, ValueError) as error:
        raise ValueError(f"rand_augment {config!r} is not timm's form, such as 'rand-m9-mstd0.5'") from error
