"""Named records of a batch between worker processes and a device, and what a decoder is."""

from dataclasses import dataclass, fields, replace
from typing import ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

OPERATIONS = (  # timm's functions, in the order of their numbers in a plan
    "shear_x", "shear_y", "translate_x_rel", "translate_y_rel", "rotate", "auto_contrast", "equalize",
    "invert", "solarize", "solarize_add", "posterize", "contrast", "brightness", "color", "sharpness",
)  # fmt: skip
GEOMETRIC = OPERATIONS[:5]
NO_OPERATION = -1


class Operation(NamedTuple):
    """An operation of RandAugment on one image: number in `OPERATIONS`, argument, and PIL's filter."""

    number: int = NO_OPERATION
    argument: float = 0.0
    filter: int = 0


class Box(NamedTuple):
    """A part of one image: its crop, or what is erased of it; nothing if the height is 0."""

    top: int = 0
    left: int = 0
    height: int = 0
    width: int = 0


@dataclass(frozen=True)
class Plan:
    """The augmentation of a batch's images as numbers, float32.

    Attributes:
        number: `(batch, layers)`, of an `Operation`.
        argument: likewise.
        filter: likewise.
        box: `(batch, 4)`, a `Box`.
        seed: `(batch, 1)`, of the noise in the box.
    """

    number: Tensor
    argument: Tensor
    filter: Tensor
    box: Tensor
    seed: Tensor

    @staticmethod
    def row(operations: list[Operation], box: Box, seed: int) -> Tensor:
        """Return one image's plan as it travels: `(3 * layers + 5,)`."""
        return torch.tensor([*(value for operation in operations for value in operation), *box, seed])

    @classmethod
    def unpacked(cls, rows: Tensor) -> "Plan":
        """Return the plan of a batch from its images' rows."""
        operations, box, seed = rows.split((rows.shape[1] - 5, 4, 1), 1)
        number, argument, filter_ = operations.unflatten(1, (-1, 3)).unbind(2)
        return cls(number, argument, filter_, box, seed)

    @property
    def num_layers(self) -> int:
        return self.number.shape[1]

    def for_kernels(self, size: tuple[int, int]) -> Tensor:
        """Return the plan as `triton_augmentation.augmented` takes it, for a height and a width."""
        operations = torch.stack((self.number, self.argument, self.filter), 2)
        layers = torch.cat((operations, self._maps(size)), 2)
        return torch.cat((layers.flatten(1), self.box, self.seed), 1)

    def _maps(self, size: tuple[int, int]) -> Tensor:
        """Return affine maps of the output's pixels to the input's, `(batch, layers, 6)`."""
        height, width = size
        shear_x, shear_y, right, down, turn = (
            torch.where(self.number == i, self.argument, 0) for i in range(5)
        )
        angle = torch.deg2rad(-turn)  # PIL turns the other way round
        cos, sin = angle.cos(), angle.sin()
        x, y = width / 2, height / 2  # the center stays
        to_x = cos, sin + shear_x, right * width + x - cos * x - sin * y
        to_y = shear_y - sin, cos, down * height + y + sin * x - cos * y
        return torch.stack((*to_x, *to_y), 2)


@dataclass(frozen=True)
class Columns:
    """A record of several images: an int64 tensor `(count,)` on the CPU for each name not `shared`."""

    shared: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def row(cls, **numbers: int) -> Tensor:
        """Return one image's numbers as they travel; those that are not given are 0."""
        row = dict.fromkeys((field.name for field in fields(cls)), 0) | numbers
        return torch.tensor([int(number) for number in row.values()])

    @classmethod
    def unpacked(cls, rows: Tensor) -> Self:
        """Return the record of a batch from its images' rows."""
        names = (field.name for field in fields(cls))
        return cls(**dict(zip(names, rows.unbind(1), strict=True)))

    def __getitem__(self, index: Tensor | slice) -> Self:
        names = (field.name for field in fields(self) if field.name not in self.shared)
        return replace(self, **{name: getattr(self, name)[index] for name in names})


@dataclass(frozen=True)
class Crops(Columns):
    """Parts of images, and how they are resized: by a bicubic filter or a bilinear one, mirrored or not."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    bicubic: Tensor
    mirrored: Tensor


@dataclass(frozen=True)
class Windows(Columns):
    """Parts of resized images: the sizes to which images are resized, and where in these the parts begin."""

    height: Tensor
    width: Tensor
    top: Tensor
    left: Tensor


@dataclass(frozen=True)
class EncodedFiles(Columns):
    """JPEG files, one behind the other in memory.

    Attributes:
        start: first byte of each file.
        length: its number of bytes.
        height: height of its image.
        width: width of its image.
        plain: 1 if a GPU's own decoders know its kind.
        data: `(num_bytes,)` uint8 on the CPU, all files' bytes; pinned memory is copied faster.
    """

    shared = ("data",)
    start: Tensor
    length: Tensor
    height: Tensor
    width: Tensor
    plain: Tensor
    data: Tensor

    def parts(self) -> list[Tensor]:
        """Return the bytes of each file."""
        places = zip(self.start.tolist(), self.length.tolist(), strict=True)
        return [self.data[start : start + length] for start, length in places]


@dataclass(frozen=True)
class EncodedCrops(Crops):
    """Crops of images that travel one behind the other, as JPEG files, and what `EncodedFiles` says of these.

    An image that a device cannot decode travels as the pixels of its crop, and its crop's height is 0.
    """

    length: Tensor
    image_height: Tensor
    image_width: Tensor
    plain: Tensor

    def files(self, data: Tensor) -> EncodedFiles:
        """Return the images as files; `data` is their bytes."""
        start = self.length.cumsum(0) - self.length
        return EncodedFiles(start, self.length, self.image_height, self.image_width, self.plain, data)


@dataclass(frozen=True)
class DecodedImages(Columns):
    """Images `(3, height, width)` uint8 on a device, at these addresses.

    Attributes:
        memory: what holds them: images, or blocks with many of them.
        event: the event after which they are there; None: they are.
    """

    shared = ("memory", "event")
    address: Tensor
    height: Tensor
    width: Tensor
    memory: list[Tensor]
    event: torch.Event | None = None

    @classmethod
    def of(cls, images: list[Tensor]) -> "DecodedImages":
        """Return the record of images that are there, and make them contiguous (libjpeg's are not)."""
        images = [image.contiguous() for image in images]
        places = torch.tensor([(image.data_ptr(), *image.shape[1:]) for image in images])
        return cls(places[:, 0], places[:, 1], places[:, 2], images)

    def wait(self) -> None:
        """Let the device's current stream go on when the images are there."""
        if self.event is not None:
            stream = torch.cuda.current_stream(self.memory[0].device)
            stream.wait_event(self.event)
            for memory in self.memory:
                memory.record_stream(stream)


class Decoder(Protocol):
    """Decodes JPEG files on one device, for one thread at a time.

    It may write to new memory at once, even if the device's current stream has still to read what was in it
    before: that must be a stream on which nothing else runs.
    """

    def __call__(self, files: EncodedFiles) -> DecodedImages:
        """Decode files.

        Raises:
            RuntimeError: a file is broken, or of a kind that the decoder does not know.
        """
        ...
