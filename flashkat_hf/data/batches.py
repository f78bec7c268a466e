"""Batches of images in an order, and with an augmentation, that are pure functions of (seed, epoch, position).

So a run that was interrupted in the middle of an epoch goes on with the same images without any saved
generator, and one process sees the same images as several that share the same global batch.
"""

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice
from typing import Any, cast

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from transformers.utils import logging

from .augmentation import Transform
from .samples import DataError, Examples, Sample, Share, Stream, open_image

logger = logging.get_logger(__name__)
Batch = dict[str, Tensor]
PATIENCE = 1000  # corrupt images in a row of a stream


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
        """Nothing is read before `epoch`.

        Args:
            split: `ImageData.train`.
            transform: a `training_transform`.
            batch_size: images of one process and micro-batch.
            seed: of order and augmentation; the same in every process.
            workers: processes that read and augment; 0: this one does.
            rank: of this process.
            world_size: number of processes.
            pin_memory: for faster copies to a GPU.
            epochs: of the run, taken in order: where there is random access, workers go on with the next
                one's batches while the end of an epoch is trained on, and evaluated. None: they wait until it
                is asked for.

        Raises:
            DataError: the split has fewer images than one batch of all processes, or does not know how many
                it has.
        """
        self.split, self.batch_size, self.seed, self.rank, self.world_size = (
            split,
            batch_size,
            seed,
            rank,
            world_size,
        )
        if split.num_images is None:
            raise DataError("the number of training images is unknown; give it (train_size)")
        self.num_batches = split.num_images // (batch_size * world_size)
        if not self.num_batches:
            raise DataError(
                f"{world_size} x {batch_size} images make a batch, but there are only {split.num_images} for training"
            )
        self.corrupt: dict[str, str] = {}
        self.ahead: Iterator[Batch] = iter(())
        self.following: tuple[int, int] | None = None  # epoch and number of the batch that comes next
        options: dict[str, Any] = {"pin_memory": pin_memory}
        if isinstance(split, Examples):
            self.sampler = _Positions(split.num_images, batch_size, seed, rank, world_size, epochs)
            dataset = _Indexed(split, transform, seed)
            self.loader = _loader(
                dataset, workers, batch_sampler=self.sampler, collate_fn=_collate, **options
            )
        else:
            workers = min(workers, split.most_workers(world_size))
            self.sampler = _StreamPosition()
            share = Share(rank, world_size, batch_size=batch_size)
            dataset = _Streamed(split, transform, share, batch_size, self.sampler, seed)
            self.loader = _loader(dataset, workers, split.start_method, batch_size=None, **options)

    def __len__(self) -> int:
        return self.num_batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on.

        Returns:
            `{"pixel_values": (batch, channels, height, width) float32, "labels": (batch,) int64}` on the CPU;
            for a `batch_transform`, what that takes.

        Raises:
            DataError: an image cannot be read, and the split does not skip such.
        """
        if self.following != (epoch, start):
            self.sampler.set(epoch, start)
            self.ahead = _checked(self.loader, self.corrupt)
        for number in range(start, self.num_batches):
            self.following = None  # if this raises
            batch = next(self.ahead)
            if number + 1 < self.num_batches:
                self.following = epoch, number + 1
            elif isinstance(self.sampler, _Positions) and epoch + 1 < self.sampler.stop:
                self.following = epoch + 1, 0
            yield batch


class EvalBatches:
    """One process's share of a split: over all processes every image exactly once.

    The last batch may be short.

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
    ):
        self.corrupt: dict[str, str] = {}
        options: dict[str, Any] = {"pin_memory": pin_memory}
        self.num_batches = None
        if isinstance(split, Examples):
            share = range(rank, split.num_images, world_size)
            self.num_batches = -(-len(share) // batch_size)
            options |= {"batch_size": batch_size, "sampler": share, "collate_fn": _collate}
            self.loader = _loader(_Indexed(split, transform), workers, persistent=False, **options)
        else:
            workers = min(workers, split.most_workers(world_size))
            dataset = _Streamed(split, transform, Share(rank, world_size), batch_size)
            self.loader = _loader(dataset, workers, split.start_method, batch_size=None, **options)

    def __len__(self) -> int:
        """Number of batches.

        Raises:
            TypeError: it is a stream's, which is not known before.
        """
        if self.num_batches is None:
            raise TypeError("a stream does not know its number of batches")
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return _checked(self.loader, self.corrupt)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seeds random, numpy and torch (CPU) from these numbers, and puts their states back afterwards.

    Not so in a worker process, where nothing else draws.
    """
    generator = torch.default_generator
    states = (
        None if get_worker_info() else (random.getstate(), numpy.random.get_state(), generator.get_state())
    )
    words = numpy.random.SeedSequence(numbers).generate_state(4)
    random.seed(int(words[0]) << 32 | int(words[1]))
    numpy.random.seed(words[2])
    generator.manual_seed(int(words[3]))  # not torch.manual_seed, which would seed every GPU too
    try:
        yield
    finally:
        if states:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            generator.set_state(states[2])


class _Positions:
    """Batch sampler: lists of (epoch, position in the order, index of the image).

    Of one epoch, or up to the last.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        epochs: int | None = None,
    ):
        self.num_images, self.batch_size, self.seed, self.rank, self.world_size = (
            num_images, batch_size, seed, rank, world_size,
        )  # fmt: skip
        self.epochs = epochs or 0
        self.set(0, 0)

    def set(self, epoch: int, start: int) -> None:
        self.epoch, self.start, self.stop = epoch, start, max(epoch + 1, self.epochs)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for epoch in range(self.epoch, self.stop):
            yield from self._positions(epoch, self.start if epoch == self.epoch else 0)

    def _positions(self, epoch: int, start: int) -> Iterator[list[tuple[int, int, int]]]:
        (word,) = numpy.random.SeedSequence([self.seed, epoch]).generate_state(1, numpy.uint64)
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(int(word) >> 1))
        step = self.batch_size * self.world_size
        for first in range(start * step, self.num_images - step + 1, step):
            first += self.rank * self.batch_size
            indices = order[first : first + self.batch_size].tolist()
            yield [(epoch, first + i, index) for i, index in enumerate(indices)]


class _Indexed(Dataset):
    """One image: by (epoch, position, index) in training, by its index in evaluation."""

    def __init__(self, examples: Examples, transform: Transform, seed: int | None = None):
        self.examples, self.transform, self.seed = examples, transform, seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key) -> dict[str, Any]:
        if self.seed is None:
            return _prepare(self.examples[key], self.transform, self.examples.skip_corrupt)
        epoch, position, index = key
        following = (self.examples[(index + i) % len(self.examples)] for i in range(len(self.examples)))
        return _readable(following, self.transform, self.examples.skip_corrupt, (self.seed, epoch, position))


class _StreamPosition:
    """Epoch and first batch; in shared memory, where worker processes that are there already read them."""

    def __init__(self):
        self.shared = torch.zeros(2, dtype=torch.int64).share_memory_()

    def set(self, epoch: int, start: int) -> None:
        self.shared.copy_(torch.tensor([epoch, start]))

    def get(self) -> list[int]:
        return self.shared.tolist()


class _Streamed(IterableDataset):
    """The batches of a worker: endlessly, pass after pass, in training.

    Once in evaluation (without a position).
    """

    def __init__(
        self,
        stream: Stream,
        transform: Transform,
        share: Share,
        batch_size: int,
        position: _StreamPosition | None = None,
        seed: int = 0,
    ):
        self.stream, self.transform, self.share, self.batch_size = stream, transform, share, batch_size
        self.position, self.seed = position, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        share = replace(self.share, worker=info.id, workers=info.num_workers) if info else self.share
        if self.position is None:
            samples = self.stream.samples(None, share)
            while batch := list(islice(samples, self.batch_size)):
                yield _collate(
                    [_prepare(sample, self.transform, self.stream.skip_corrupt) for sample in batch]
                )
            return
        epoch, start = self.position.get()
        # the loader asks its workers in turn, and this one made batches number worker, worker + workers, ...
        # before
        made = len(range(share.worker, start, share.workers))
        if share.worker < start % share.workers:
            yield {}  # its next batch comes after `start`; the loader's first round is not complete
        samples = islice(self._passes(epoch, share), made * self.batch_size, None)
        ahead: list[Sample] = []  # what was read to replace corrupt images, and is still to come itself
        for first in count(made * self.batch_size, self.batch_size):
            yield _collate(
                [self._item(samples, ahead, epoch, first + i, share) for i in range(self.batch_size)]
            )

    def _item(
        self, samples: Iterator[Sample], ahead: list[Sample], epoch: int, number: int, share: Share
    ) -> dict:
        seeds = (self.seed, epoch, number, share.rank * share.workers + share.worker)
        item = _readable(_remembered(samples, ahead), self.transform, self.stream.skip_corrupt, seeds)
        ahead.pop(0)
        return item

    def _passes(self, epoch: int, share: Share) -> Iterator[Sample]:
        for again in count():
            found = False
            for sample in self.stream.samples((self.seed, epoch + again * 2**20), share):
                found = True
                yield sample
            if not found:
                raise DataError(
                    "a share of the stream is empty: fewer workers or processes, or more shards, are needed"
                )


def _remembered(samples: Iterator[Sample], ahead: list[Sample]) -> Iterator[Sample]:
    """The samples in `ahead`, then further ones, which are added to it."""
    yield from ahead.copy()
    for sample in islice(samples, PATIENCE):
        ahead.append(sample)
        yield sample


def _readable(
    following: Iterable[Sample], transform: Transform, skip_corrupt: bool, seeds: tuple
) -> dict[str, Any]:
    """The first of the samples that can be read; the earlier ones are reported in its `corrupt`."""
    corrupt: dict[str, str] = {}
    for sample in following:
        with seeded(*seeds):
            item = _prepare(sample, transform, skip_corrupt)
        corrupt |= item["corrupt"]
        if "labels" in item:
            return item | {"corrupt": corrupt}
    raise DataError(
        f"{len(corrupt)} images in a row cannot be read: {next(iter(corrupt.values()))}, and so on"
    )


def _prepare(sample: Sample, transform: Transform, skip_corrupt: bool) -> dict[str, Any]:
    """The transformed image and its label; or, of a corrupt image that may be skipped, only a message."""
    try:
        takes_sample = getattr(transform, "takes_sample", False)
        made = transform(sample if takes_sample else open_image(sample.image, sample.name))
    except DataError as error:
        if not skip_corrupt:
            raise
        return {"corrupt": {sample.name: str(error)}}
    return {
        **(made if isinstance(made, dict) else {"pixel_values": made}),
        "labels": sample.label,
        "corrupt": {},
    }


def _collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of what could be read, and the messages on the rest."""
    corrupt = {name: message for item in items for name, message in item.pop("corrupt").items()}
    items = [item for item in items if item]
    if items and items[0]["pixel_values"].ndim == 1:  # encoded files, of unequal lengths
        files = [item.pop("pixel_values") for item in items]
        if get_worker_info():  # where the process that waits for it finds it, as default_collate does
            storage = torch.UntypedStorage._new_shared(sum(map(len, files)), device="cpu")
            packed = torch.cat(files, out=torch.empty(0, dtype=torch.uint8).set_(storage))
        else:
            packed = torch.cat(files)
        return {**default_collate(items), "pixel_values": packed, "corrupt": corrupt}
    return {**(default_collate(items) if items else {}), "corrupt": corrupt}


def _loader(
    dataset, workers: int, start_method: str | None = None, persistent: bool = True, **options
) -> DataLoader:
    if workers:
        options |= {"num_workers": workers, "persistent_workers": persistent, "worker_init_fn": _start_worker}
        options["multiprocessing_context"] = start_method
    if start_method == "forkserver":
        multiprocessing.set_forkserver_preload([__name__, "datasets"])
    # a generator of its own: otherwise each epoch would draw a seed from torch's global one
    return DataLoader(dataset, generator=torch.Generator(), **options)


def _start_worker(worker: int) -> None:
    """One thread.

    Ended by the main process alone, which has still to save when others say that all shall end.

    A process group of its own keeps off Ctrl-C and signals to the group; the rest is those to each process of
    a job.
    """
    torch.set_num_threads(1)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    if hasattr(signal, "sigwaitinfo"):  # Linux: says who has sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    parent = cast(Any, multiprocessing.parent_process()).pid  # os.getppid() may be the fork server
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _checked(loader: DataLoader, corrupt: dict[str, str]) -> Iterator[Batch]:
    try:
        for batch in loader:
            for name, message in batch.pop("corrupt", {}).items():
                if name not in corrupt:
                    corrupt[name] = message
                    logger.warning(f"skipped: {message}")
            if batch:
                yield batch
    except DataError as error:  # a worker's error carries its traceback in front of the message
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from error
