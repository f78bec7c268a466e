"""The workers' part before a `BatchAugmentation`: draw what timm draws, and note it in place of doing it."""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, JpegImagePlugin
from torch import Tensor

from ...messages import extra
from ..samples import DataError, Encoded, Sample, header, open_image, unreadable, upright_rgb
from .records import GEOMETRIC, OPERATIONS, Box, EncodedCrops, Operation, Plan

ORIENTATION = 0x0112  # EXIF's number of it
TURNED = (5, 6, 7, 8)  # orientations that exchange width and height


class Draws:
    """A stand-in for an image, on which timm's RandAugment and RandomErasing note what they would do."""

    dtype = torch.float32

    def __init__(self, rand_augment, erasing, size: tuple[int, int]):
        self.shape = (1, *size)
        self.operations: list[Operation] = []
        self.box = Box()
        if rand_augment is not None:
            rand_augment(self)
            missing = rand_augment.num_layers - len(self.operations)
            self.operations += [Operation()] * missing
        if erasing is not None:
            erasing(self)

    def size(self) -> tuple[int, int, int]:
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], noise: Tensor) -> None:
        _, rows, columns = place
        self.box = Box(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)

    def plan(self) -> Tensor:
        """Return the image's row of a `Plan`."""
        return Plan.row(self.operations, self.box, random.getrandbits(24))  # a float32 holds the seed


def _note(number: int, draws: Draws, *arguments: float, resample: Any, fillcolor: Any) -> Draws:
    """Note an operation, and draw its filter, as one of timm's functions would."""
    filter_ = 0
    if number < len(GEOMETRIC):
        filter_ = random.choice(resample) if isinstance(resample, Sequence) else resample
    draws.operations.append(Operation(number, float(arguments[0]) if arguments else 0.0, int(filter_)))
    return draws


def in_batches(rand_augment: str | None) -> bool:
    """Return whether batches can do all operations of timm's RandAugment of this configuration string."""
    if not rand_augment:
        return True
    transform = extra("timm.data.auto_augment").rand_augment_transform(rand_augment, {})
    return all(operation.aug_fn.__name__ in OPERATIONS for operation in transform.ops)


def drawing(rand_augment) -> Any:
    """Change timm's RandAugment so that it notes its operations in `Draws`, and return it.

    Raises:
        ValueError: it has an operation that is not in `OPERATIONS`.
    """
    for operation in rand_augment.ops:
        name = operation.aug_fn.__name__
        if name not in OPERATIONS:
            raise ValueError(
                f"RandAugment's {operation.name} cannot be done in batches; use on_device='nothing'"
            )
        operation.aug_fn = partial(_note, OPERATIONS.index(name))
    return rand_augment


class PlannedPart:
    """Base of the worker processes' transforms: they note in a `Plan` what a `BatchAugmentation` will do."""

    takes_sample = True

    def __init__(self, transforms: tuple, size: tuple[int, int]):
        """Take three transforms: of PIL images; timm's RandAugment; its normalisation and erasing."""
        _, second, last = (part.transforms for part in transforms)
        self.size = size
        self.rand_augment = drawing(second[0]) if second else None
        self.erasing = next((part for part in last if type(part).__name__ == "RandomErasing"), None)
        if self.erasing is not None:
            self.erasing.per_pixel = False  # only the box is wanted of it, not the noise

    def _plan(self) -> Tensor:
        return Draws(self.rand_augment, self.erasing, self.size).plan()


class MovedPart(PlannedPart):
    """A worker process's transform of an image that is used whole and moved a little."""

    def __init__(self, transforms: tuple, size: tuple[int, int]):
        super().__init__(transforms, size)
        self.moves = transforms[0]

    def __call__(self, sample: Sample) -> dict[str, Tensor]:
        """Return the moved image's pixels, `(3, height, width)` uint8, and as "plan" a row of a `Plan`."""
        image = open_image(sample.image, sample.name)
        try:
            moved = self.moves(image)
        except DataError as error:
            raise DataError(f"cannot use the image {sample.name}: {error}") from error
        pixels = extra("torchvision.transforms.functional").pil_to_tensor(moved)
        return {"pixel_values": pixels, "plan": self._plan()}


class WorkerPart(PlannedPart):
    """A worker process's transform of one encoded image of which a part is cropped."""

    def __init__(self, transforms: tuple, size: tuple[int, int], decode: bool):
        super().__init__(transforms, size)
        self.crop, *self.flip = transforms[0].transforms
        self.decode = decode

    def __call__(self, sample: Sample) -> dict[str, Tensor]:
        """Return the image's pixels and its plan, and with `decode` its crop.

        Returns:
            "pixel_values": the crop's pixels, `(3, height, width)` uint8; with `decode` the bytes of a JPEG
            file, `(length,)` uint8, or the crop's flat pixels if a device cannot decode the image. "plan": a
            row of a `Plan`. "crop": a row of `EncodedCrops`.
        """
        encoded = read(sample) if self.decode else sample.image
        try:
            with header(encoded) as image:
                turned = _is_turned(image)
                width, height = image.size[::-1] if turned else image.size
                box, filter_ = self._box(width, height), self._filter()
                if self.decode and isinstance(encoded, bytes) and decodable(image, encoded):
                    return self._undecoded(encoded, image, box, filter_)
                # libjpeg leaves out what is not needed for a result at least as large as the crop's
                least = width * self.size[1] // box.width, height * self.size[0] // box.height
                image.draft(None, (least[1], least[0]) if turned else least)
                image = upright_rgb(image)
        except Exception as error:  # PIL's decoders raise more than OSError for broken files
            raise unreadable(sample.image, sample.name, error) from error
        pixels = self._cropped(image, box, image.width / width, image.height / height, filter_)
        if not self.decode:
            return {"pixel_values": pixels, "plan": self._plan()}
        crop = EncodedCrops.row(length=pixels.numel())
        return {"pixel_values": pixels.flatten(), "plan": self._plan(), "crop": crop}

    def _cropped(self, image: Image.Image, box: Box, x: float, y: float, filter_) -> Tensor:
        """Crop and flip an image that is smaller than its header says by the factors x and y."""
        functions, (top, left, rows, columns) = extra("torchvision.transforms.functional"), box
        if x == y == 1:
            image = functions.resized_crop(image, *box, self.size, filter_)
        else:
            right, bottom = min((left + columns) * x, image.width), min((top + rows) * y, image.height)
            part = left * x, top * y, right, bottom
            image = image.resize((self.size[1], self.size[0]), Image.Resampling[filter_.name], part)
        for part in self.flip:
            image = part(image)
        return functions.pil_to_tensor(image)

    def _undecoded(self, encoded: bytes, image: Image.Image, box: Box, filter_) -> dict[str, Tensor]:
        crop = EncodedCrops.row(
            **box._asdict(),
            bicubic=filter_.value == "bicubic",
            mirrored=any(torch.rand(1) < part.p for part in self.flip),  # torchvision's draw
            length=len(encoded),
            image_height=image.height,
            image_width=image.width,
            plain=is_plain(image),
        )
        data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        return {"pixel_values": data, "plan": self._plan(), "crop": crop}

    def _box(self, width: int, height: int) -> Box:
        canvas = torch.empty(1, height, width, device="meta")  # only its size is asked for
        return Box(*self.crop.get_params(canvas, self.crop.scale, self.crop.ratio))

    def _filter(self) -> Any:
        filters = self.crop.interpolation
        return random.choice(filters) if isinstance(filters, tuple) else filters


def read(sample: Sample) -> Encoded:
    """Return the file's bytes, if there is a file."""
    if not isinstance(sample.image, str | Path):
        return sample.image
    try:
        return Path(sample.image).read_bytes()
    except OSError as error:
        raise unreadable(sample.image, sample.name, error) from error


def _is_turned(image: Image.Image) -> bool:
    """Return whether a file's orientation will exchange the width and height that are known of it."""
    tags = getattr(image, "tag_v2", None)  # of TIFF, whose size Pillow exchanges when it opens a file
    exchanged = tags is not None and image.size != (tags[256], tags[257])
    return image.getexif().get(ORIENTATION) in TURNED and not exchanged


def decodable(image, encoded: bytes) -> bool:
    """Return whether nvJPEG gives what PIL gives: a whole upright JPEG of one frame and 1 or 3 components."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or len(image.layer) != image.layers:
        return False
    return image.getexif().get(ORIENTATION, 1) == 1 and b"\xff\xd9" in encoded[-64:]


def is_plain(image) -> bool:
    """Return whether a GPU's own decoders know the file: not progressive, without rare chroma."""
    known = image.mode == "L" or JpegImagePlugin.get_sampling(image) >= 0
    return known and not image.info.get("progressive")
