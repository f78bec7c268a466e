"""Batches of images whose order and augmentation are pure functions of (seed, epoch, position).

So a run that was interrupted in the middle of an epoch goes on with the same images without any saved
generator, and one process sees the same images as several that share the same global batch.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils import logging

from .samples import DataError, Examples, Partition, Stream, Transform
from .seeding import random_integer
from .workers import Indexed, Streamed, StreamPosition, collate, delivered, end_workers, make_loader

logger = logging.get_logger(__name__)
Batch = dict[str, Tensor]
EVALUATION_BYTES = 2**28  # of evaluation batches that are kept for the next evaluation


class TrainBatches:
    """The training batches of one process; an incomplete last one is dropped.

    Global micro-batch k of an epoch is positions `[k * batch_size * world_size, (k + 1) * batch_size *
    world_size)` of the epoch's random order, and each process takes a contiguous part of it. `docs/data.md`
    has what holds for streams.

    Attributes:
        corrupt: messages on the images that were replaced so far, by the image's name; with `skip_corrupt`
            only.
    """

    def __init__(
        self,
        split: Examples | Stream,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        epochs: int | None = None,
    ):
        """Prepare to read; nothing is read before `epoch`.

        Args:
            split: `ImageData.train`.
            transform: a `training_transform`.
            batch_size: images of one process and micro-batch.
            seed: seed of order and augmentation; the same in every process.
            workers: number of processes that read and augment; 0: this one does.
            rank: index of this process.
            world_size: number of processes.
            pin_memory: make faster copies to a GPU possible.
            epochs: number of epochs of the run, taken in order: where there is random access, workers go on
                with the next one's batches while the end of an epoch is trained on, and evaluated. None: they
                wait until it is asked for.

        Raises:
            DataError: the split has fewer images than one batch of all processes, or does not know how many
                it has.
        """
        self.num_batches = count_batches(split, batch_size, world_size)
        self.corrupt: dict[str, str] = {}
        self.ahead: Iterator[Batch] = iter(())
        self.following: tuple[int, int] | None = None  # epoch and number of the batch that comes next
        options: dict[str, Any] = {"pin_memory": pin_memory}
        if isinstance(split, Examples):
            self.position = EpochOrder(len(split), batch_size, seed, rank, world_size, epochs or 0)
            dataset = Indexed(split, transform, seed)
            options |= {"batch_sampler": self.position, "collate_fn": collate}
        else:
            self.position = StreamPosition()
            workers = min(workers, split.most_workers(world_size))
            partition = Partition(rank, world_size, batch_size=batch_size)
            dataset = Streamed(split, transform, partition, batch_size, self.position, seed)
            options |= {"batch_size": None, "start_method": split.start_method}
        self.loader = make_loader(dataset, workers, **options)

    def __len__(self) -> int:
        return self.num_batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from number `start` on.

        Returns:
            `{"pixel_values": (batch, channels, height, width) float32, "labels": (batch,) int64}` on the CPU;
            for a `batch_transform`, what that takes.

        Raises:
            DataError: an image cannot be read, and the split does not skip such.
        """
        if self.following != (epoch, start):
            self.position.set(epoch, start)
            self.ahead = checked(self.loader, self.corrupt)
        for number in range(start, self.num_batches):
            self.following = None  # if this raises
            batch = next(self.ahead)
            if number + 1 < self.num_batches:
                self.following = epoch, number + 1
            elif isinstance(self.position, EpochOrder) and epoch + 1 < self.position.stop:
                self.following = epoch + 1, 0
            yield batch

    def close(self) -> None:
        """End the worker processes."""
        self.ahead, self.following = iter(()), None
        end_workers(self.loader)


def count_batches(split: Examples | Stream, batch_size: int, world_size: int) -> int:
    """Return the number of whole training batches of each process.

    Raises:
        DataError: the split has fewer images than one batch of all processes, or does not know how many.
    """
    if split.num_images is None:
        raise DataError("the number of training images is unknown; give it (train_size)")
    num_batches = split.num_images // (batch_size * world_size)
    if not num_batches:
        available = f"there are only {split.num_images} for training"
        raise DataError(f"{world_size} x {batch_size} images make a batch, but {available}")
    return num_batches


class EvalBatches:
    """One process's part of a split: all processes together have every image once.

    The last batch may be short. With `keep`, the batches of a first complete pass are kept for later ones, if
    they are at most `EVALUATION_BYTES`: small images take longer to read than to evaluate.

    Attributes:
        corrupt: messages on the images that were left out so far, by the image's name; with `skip_corrupt`
            only.
    """

    def __init__(
        self,
        split: Examples | Stream,
        transform: Transform,
        *,
        batch_size: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        keep: bool = False,
    ):
        self.corrupt: dict[str, str] = {}
        self.keep = keep
        self.kept: list[Batch] = []
        self.num_batches = None
        options: dict[str, Any] = {"pin_memory": pin_memory}
        if isinstance(split, Examples):
            indices = range(rank, split.num_images, world_size)
            self.num_batches = -(-len(indices) // batch_size)
            options |= {
                "batch_size": batch_size,
                "sampler": indices,
                "collate_fn": collate,
                "persistent": False,
            }
            self.loader = make_loader(Indexed(split, transform), min(workers, self.num_batches), **options)
        else:
            workers = min(workers, split.most_workers(world_size))
            dataset = Streamed(split, transform, Partition(rank, world_size), batch_size)
            self.loader = make_loader(dataset, workers, split.start_method, batch_size=None, **options)

    def __len__(self) -> int:
        """Return the number of batches.

        Raises:
            TypeError: it is a stream's, which is not known before.
        """
        if self.num_batches is None:
            raise TypeError("a stream does not know its number of batches")
        return self.num_batches

    def keeps(self, batch: Batch) -> bool:
        """Tell by one of the batches whether all of them are kept."""
        size = sum(tensor.nbytes for tensor in batch.values())
        return self.keep and self.num_batches is not None and self.num_batches * size <= EVALUATION_BYTES

    def __iter__(self) -> Iterator[Batch]:
        if self.kept:
            yield from map(dict, self.kept)
            return
        batches, keep, room = [], self.keep, EVALUATION_BYTES
        for batch in checked(self.loader, self.corrupt):
            room -= sum(tensor.nbytes for tensor in batch.values())
            keep = keep and room >= 0
            if keep:
                batches.append({name: _own(tensor) for name, tensor in batch.items()})
            yield batch
        self.kept = batches if keep else []

    def close(self) -> None:
        """End the worker processes."""
        end_workers(self.loader)


def _own(tensor: Tensor) -> Tensor:
    """Return a tensor that holds no shared memory and open file, both scarce, as a worker's does."""
    return tensor.clone() if tensor.is_shared() else tensor


class EpochOrder:
    """Batch sampler: lists of (epoch, position, index of the image), of one epoch or up to the last."""

    def __init__(self, num_images: int, batch_size: int, seed: int, rank: int, world_size: int, epochs: int):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epochs = epochs
        self.set(0, 0)

    def set(self, epoch: int, start: int) -> None:
        self.epoch = epoch
        self.start = start
        self.stop = max(epoch + 1, self.epochs)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for epoch in range(self.epoch, self.stop):
            for first, indices in self.batches(epoch, self.start if epoch == self.epoch else 0):
                yield [(epoch, position, index) for position, index in enumerate(indices.tolist(), first)]

    def batches(self, epoch: int, start: int) -> Iterator[tuple[int, Tensor]]:
        """Yield each batch of an epoch from number `start` on: its first position and its indices."""
        generator = torch.Generator().manual_seed(random_integer(self.seed, epoch) >> 1)
        order = torch.randperm(self.num_images, generator=generator)
        step = self.batch_size * self.world_size
        for batch in range(start * step, self.num_images - step + 1, step):
            first = batch + self.rank * self.batch_size
            yield first, order[first : first + self.batch_size]


def checked(loader: DataLoader, corrupt: dict[str, str]) -> Iterator[Batch]:
    """Yield a loader's batches; messages on corrupt images are said once and noted in `corrupt`.

    Raises:
        DataError: in one line: an image cannot be read, or as `delivered`.
    """
    try:
        for batch in delivered(loader):
            for name, message in batch.pop("corrupt", {}).items():
                if name not in corrupt:
                    corrupt[name] = message
                    logger.warning(f"skipped: {message}")
            if batch:
                yield batch
    except DataError as error:  # a worker's error carries its traceback in front of the message
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from error
