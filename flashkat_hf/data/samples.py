"""Labelled images before they are decoded, and how they are opened: what every source of data is made of."""

import io
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
Encoded = str | Path | bytes | Image.Image  # a file's path, a file's bytes, or pixels


class DataError(ValueError):
    """Data that a user has to mend; the message is one line and names the image, file or folder."""


class Sample(NamedTuple):
    """One labelled image, not decoded yet."""

    image: Encoded
    label: int
    name: str  # what messages call it


class Paths(Sequence[str]):
    """Paths in one block of memory.

    Worker processes share it, where a list's reference counts would copy it.
    """

    def __init__(self, paths: Iterable[str]):
        self.encoded = numpy.array([os.fsencode(path) for path in paths], dtype=numpy.bytes_)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return os.fsdecode(bytes(self.encoded[index]))


@dataclass(frozen=True)
class Examples:
    """A split with random access.

    Attributes:
        images: paths, or images in memory.
        labels: the index of each one's class.
        skip_corrupt: training replaces an image that cannot be read by the next one, evaluation leaves it
            out.
        name: what messages call the split, where the images have no names.
    """

    images: Sequence[Encoded]
    labels: Sequence[int]
    skip_corrupt: bool = False
    name: str = "the images"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_images(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        image = self.images[index]
        return Sample(
            image,
            int(self.labels[index]),
            image if isinstance(image, str) else f"number {index} of {self.name}",
        )


@dataclass(frozen=True)
class Share:
    """Which part of a stream one worker process reads.

    Attributes:
        rank: of its process.
        world_size: number of processes.
        worker: its index within its process.
        workers: number of worker processes of each process; 1 also where the process itself reads.
        batch_size: images of a micro-batch of one process; None for evaluation, which has to see every image.
    """

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    workers: int = 1
    batch_size: int | None = None

    def bounds(self, num_images: int) -> tuple[int, int]:
        """First and last + 1 position of this part, where the positions of an order can be dealt out.

        In training a worker makes batches number `worker`, `worker + workers`, ... of its process and has
        just the images for them. In evaluation the parts are equal up to one image.
        """
        if self.batch_size is None:
            part, parts = self.rank * self.workers + self.worker, self.world_size * self.workers
            return part * num_images // parts, (part + 1) * num_images // parts
        batches = num_images // (self.batch_size * self.world_size)
        before = sum(len(range(worker, batches, self.workers)) for worker in range(self.worker))
        first = (self.rank * batches + before) * self.batch_size
        return first, first + len(range(self.worker, batches, self.workers)) * self.batch_size


class Stream(Protocol):
    """A split that is read from one end to the other."""

    @property
    def skip_corrupt(self) -> bool:
        """As in `Examples`."""
        ...

    @property
    def num_images(self) -> int | None:
        """Number of images over all processes, or None where it is unknown."""
        ...

    @property
    def start_method(self) -> str | None:
        """Of worker processes, as `multiprocessing` calls it; None: the platform's."""
        ...

    def most_workers(self, world_size: int) -> int:
        """How many worker processes of each process can have a share of the stream."""
        ...

    def samples(self, shuffle: tuple[int, int] | None, share: Share) -> Iterator[Sample]:
        """One pass over a share.

        The shares of all workers have every image once, or in training at most once.

        Args:
            shuffle: (seed, epoch) of the order; None keeps the files' order.
            share: which part.
        """
        ...


SplitKind = TypeVar("SplitKind", bound="Examples | Stream", covariant=True)


@dataclass(frozen=True)
class ImageData(Generic[SplitKind]):
    """The two splits.

    Attributes:
        train: `Examples`, or a `Stream`.
        test: the held-out images, of the same classes.
        class_names: in the order of the labels.
        fingerprint: changes when the data changes; `docs/data.md` says what it sees.
    """

    train: SplitKind
    test: SplitKind
    class_names: list[str]
    fingerprint: str


def open_image(image: Encoded, name: str | None = None) -> Image.Image:
    """The whole image, upright and as RGB, as transformers' pipelines open it.

    Args:
        image: path, the bytes of a file, or an image, which is returned as RGB.
        name: what messages call it; default: the path.

    Raises:
        DataError: the file is missing, truncated or no image; the message names it.
    """
    try:
        with header(image) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # PIL's decoders raise more than OSError for broken files
        raise unreadable(image, name, error) from error


def header(image: Encoded) -> Image.Image:
    """The image with its size and mode, its pixels not decoded yet."""
    if isinstance(image, Image.Image):
        return image.copy()  # the caller closes what it gets
    return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)


def unreadable(image: Encoded, name: str | None, error: Exception) -> DataError:
    """The error that names an image which PIL could not read, and why."""
    if isinstance(error, UnidentifiedImageError):
        reason = "not a known image format"
    else:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return DataError(f"cannot read the image {name or image}: {reason}")


def check_classes(class_names: Sequence[str], where: str) -> list[str]:
    """The names as a list.

    Raises:
        DataError: there are fewer than two, or two are the same.
    """
    names = [str(name) for name in class_names]
    if len(names) < 2:
        found = f"only the class {names[0]}" if names else "no classes"
        raise DataError(f"{where} holds {found}; at least two are needed")
    if (
        twice := sorted({name for name in names if names.count(name) > 1})
        if len(set(names)) < len(names)
        else []
    ):
        raise DataError(f"{where} names a class twice: {', '.join(twice)}")
    return names


def check_labels(labels: Iterable[int], num_classes: int, where: str) -> array:
    """The labels in one block of memory.

    Raises:
        DataError: one is outside `[0, num_classes)`.
    """
    checked = array("q", labels)
    values = numpy.asarray(checked)
    wrong = numpy.flatnonzero((values < 0) | (values >= num_classes))
    if len(wrong):
        others = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise DataError(
            f"{where}: label {checked[wrong[0]]} of image {wrong[0]} is not one of the {num_classes} classes{others}"
        )
    return checked
