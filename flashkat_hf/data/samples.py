"""Labelled images before they are decoded, and how they are opened: what every source of data is made of."""

import io
import os
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError

from ..files import check_utf8
from ..messages import one_line

# Formats that Pillow opens and that hold no pixels which it decodes by itself.
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
Image.init()
IMAGE_SUFFIXES = tuple(
    sorted(
        suffix
        for suffix, form in Image.registered_extensions().items()
        if form == "MPO" or (form in Image.OPEN and form not in NO_PICTURES)
    )
)
Transform = Callable[[Any], Any]  # from an RGB image, or a `Sample`, to what a batch has of it


class DataError(ValueError):
    """Data that a user has to mend; the message is one line and names the image, file or folder."""


@dataclass(frozen=True)
class Unusable:
    """A row without a usable image, with the reason; it is skipped like an image that cannot be read."""

    reason: str


Encoded = str | Path | bytes | Image.Image | Unusable  # a file's path, a file's bytes, or pixels


class Sample(NamedTuple):
    """One labelled image, not decoded yet."""

    image: Encoded
    label: Any  # the index of its class, or what a transform that takes samples makes targets of
    name: str  # what messages call it


class Paths(Sequence[str]):
    """Paths in one block of memory, which worker processes share; a list's reference counts would copy it."""

    def __init__(self, paths: Iterable[str]):
        self.encoded = numpy.array([os.fsencode(path) for path in paths], dtype=numpy.bytes_)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return os.fsdecode(bytes(self.encoded[index]))


@dataclass(frozen=True)
class Part(Sequence[Encoded]):
    """Some of the images of a sequence, by their numbers; nothing is copied."""

    images: Sequence[Encoded]
    numbers: numpy.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Encoded:  # type: ignore[override]
        return self.images[int(self.numbers[index])]


@dataclass(frozen=True)
class Examples:
    """A split with random access.

    Attributes:
        images: paths, or images in memory.
        labels: the index of each one's class, or what a transform that takes samples makes targets of.
        skip_corrupt: training replaces an image that cannot be read by the next one, evaluation omits it.
        name: what messages call the split, where the images have no names.
    """

    images: Sequence[Encoded]
    labels: Sequence[Any]
    skip_corrupt: bool = False
    name: str = "the images"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_images(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        image = self.images[index]
        number = self.images.numbers[index] if isinstance(self.images, Part) else index
        name = image if isinstance(image, str) else f"number {number} of {self.name}"
        return Sample(image, self.labels[index], name)


@dataclass(frozen=True)
class Partition:
    """The part of a stream that one worker process reads.

    Attributes:
        rank: index of its process.
        world_size: number of processes.
        worker: its index within its process.
        num_workers: number of worker processes of each process; 1 also where the process itself reads.
        batch_size: images of a micro-batch of one process; None for evaluation, which has to see every image.
    """

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    num_workers: int = 1
    batch_size: int | None = None

    def bounds(self, num_images: int) -> tuple[int, int]:
        """Return the first and the last + 1 position of this part, if positions can be dealt out.

        In training a worker makes batches number `worker`, `worker + num_workers`, ... of its process and has
        just the images for them. In evaluation the parts are equal up to one image.
        """
        if self.batch_size is None:
            part, parts = self.rank * self.num_workers + self.worker, self.world_size * self.num_workers
            return part * num_images // parts, (part + 1) * num_images // parts
        batches = num_images // (self.batch_size * self.world_size)
        counts = [len(range(worker, batches, self.num_workers)) for worker in range(self.worker + 1)]
        first = (self.rank * batches + sum(counts[:-1])) * self.batch_size
        return first, first + counts[-1] * self.batch_size


class Stream(Protocol):
    """A split that is read from one end to the other."""

    @property
    def skip_corrupt(self) -> bool:
        """Training replaces an image that cannot be read by the next one, evaluation omits it."""
        ...

    @property
    def num_images(self) -> int | None:
        """Number of images over all processes, or None where it is unknown."""
        ...

    @property
    def start_method(self) -> str | None:
        """The way to start worker processes, by its name in `multiprocessing`; None: the platform's."""
        ...

    def most_workers(self, world_size: int) -> int:
        """Return how many worker processes of each process can have a part of the stream."""
        ...

    def samples(self, shuffle: tuple[int, int] | None, partition: Partition) -> Iterator[Sample]:
        """Yield the samples of one pass over a part.

        The parts of all workers have every image once, or in training at most once.

        Args:
            shuffle: (seed, epoch) of the order; None keeps the files' order.
            partition: the part.
        """
        ...


SplitKind = TypeVar("SplitKind", bound="Examples | Stream", covariant=True)


@dataclass(frozen=True)
class ImageData(Generic[SplitKind]):
    """The splits of a source, all of the same classes.

    Attributes:
        train: `Examples`, or a `Stream`.
        test: the images that say how good a model is.
        class_names: in the order of the labels.
        fingerprint: changes when the data changes; `docs/data.md` says what it sees.
        name: what the data are called where no source is named.
        val: the images on which the best epoch is chosen; None where the source has no third split, and
            `hold_out` has held out none.
    """

    train: SplitKind
    test: SplitKind
    class_names: list[str]
    fingerprint: str
    name: str = "digits"
    val: SplitKind | None = None


def open_image(image: Encoded, name: str | None = None) -> Image.Image:
    """Return the whole image, upright and as RGB: as transformers' pipelines do for 8-bit levels.

    Args:
        image: path, the bytes of a file, or an image, which is returned as RGB.
        name: what messages call it; default: the path.

    Raises:
        DataError: the file is missing, truncated or no image, or `upright_rgb` refuses it; the message
            names it.
    """
    try:
        with header(image) as opened:
            return upright_rgb(opened)
    except Exception as error:  # PIL's decoders raise more than OSError for broken files
        raise unreadable(image, name, error) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode upright and as RGB; deep integers and floats are scaled to 255.

    White is the largest integer of the file's depth (65,535 for 16 bits, 4,095 for 12), or 1.0.

    Raises:
        ValueError: floats outside of 0 to 1, or integers outside of the depth; it gives the range.
    """
    white = _white(image)
    upright = ImageOps.exif_transpose(image)
    if white is None:
        return upright.convert("RGB")
    values = numpy.asarray(upright)
    low, high = values.min(), values.max()
    kind = "floats" if image.mode == "F" else "integers"
    if not (low >= 0 and high <= white):  # so that NaN is refused too
        raise ValueError(f"its pixels are {kind} from {low} to {high}; 0 to {white} is expected")
    if image.mode == "I" and image.format != "PPM" and 0 < high <= 255:
        problem = f"its pixels are 32-bit integers from {low} to {high}, whose white may be 255 or {white}"
        raise ValueError(f"{problem}; save it with 8 or 16 bits")
    levels = numpy.rint(values * (255 / numpy.float64(white))).astype(numpy.uint8)
    return Image.fromarray(levels).convert("RGB")


def _white(image: Image.Image) -> int | None:
    """Return the value of white where a level has more than 8 bits; None for PIL's other modes."""
    if image.mode == "F":
        return 1
    if not (image.mode == "I" or image.mode.startswith("I;16")):
        return None
    tags = getattr(image, "tag_v2", {})  # of TIFF; PIL gives the numbers of the file as they are
    bits, signed = tags.get(258, (16,))[0], 2 in tags.get(339, ())
    return 2 ** (min(bits, 16) - signed * (bits <= 16)) - 1


@contextmanager
def header(image: Encoded) -> Iterator[Image.Image]:
    """Give the image with its size, mode and tags, its pixels not decoded yet; a file is closed afterwards.

    An image that was opened elsewhere is not copied: a copy knows neither its depth nor its orientation.
    """
    if isinstance(image, Unusable):
        raise ValueError(image.reason)
    if isinstance(image, Image.Image):
        image.load()
        yield image
        return
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        yield opened


def unreadable(image: Encoded, name: str | None, error: Exception) -> DataError:
    """Return the error that names an image which PIL could not read, and says why."""
    reason = "not a known image format" if isinstance(error, UnidentifiedImageError) else one_line(error)
    return DataError(f"cannot read the image {name or image}: {reason}")


def check_classes(class_names: Sequence[str], source: str) -> list[str]:
    """Return the names as a list, `normalised`.

    Raises:
        DataError: there are fewer than two, two are the same, or one is blank or no UTF-8.
    """
    names = [normalised(str(name), source) for name in class_names]
    if blank := [index for index, name in enumerate(names) if not name.strip()]:
        raise DataError(f"{source} has a class without a name, number {blank[0]}: {names[blank[0]]!r}")
    if len(names) < 2:
        classes = f"only the class {names[0]}" if names else "no classes"
        raise DataError(f"{source} holds {classes}; at least two are needed")
    if len(set(names)) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"{source} names a class twice: {', '.join(repeated)}")
    return names


def check_name(name: str, what: str) -> None:
    """Raise DataError where a name is no UTF-8; `what` has it."""
    try:
        check_utf8(name, what)
    except ValueError as error:
        raise DataError(str(error)) from error


def normalised(name: str, source: str) -> str:
    """Return a class name with its characters composed (Unicode's NFC), as keyboards write them.

    Raises:
        DataError: the name of a folder is no UTF-8.
    """
    check_name(name, f"a class in {source}")
    return unicodedata.normalize("NFC", name)


def check_labels(labels: Iterable[int], num_classes: int, source: str) -> array:
    """Return the labels in one block of memory.

    Raises:
        DataError: one is outside `[0, num_classes)`.
    """
    checked = array("q", labels)
    values = numpy.asarray(checked)
    wrong = numpy.flatnonzero((values < 0) | (values >= num_classes))
    if len(wrong):
        first = f"label {checked[wrong[0]]} of image {wrong[0]}"
        raise DataError(f"{source}: {first} is not one of the {num_classes} classes{and_more(wrong)}")
    return checked


def and_more(problems: Sized) -> str:
    """Return the end of a message that names the first of several problems."""
    return f", and {len(problems) - 1} more" if len(problems) > 1 else ""
