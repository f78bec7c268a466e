"""Reading, transforming and collating of images, in worker processes or in the one that trains."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from .samples import DataError, Examples, Partition, Sample, Stream, Transform, open_image
from .seeding import seeded

MOST_CORRUPT = 1000  # images in a row of a stream

_last_files: deque[dict[str, Any]] = deque(maxlen=1)  # of a worker process: its last batch of files


class Indexed(Dataset):
    """Transformed images by (epoch, position, index) in training, by their index in evaluation."""

    def __init__(self, examples: Examples, transform: Transform, seed: int | None = None):
        self.examples = examples
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key) -> dict[str, Any]:
        if self.seed is None:
            return _prepare(self.examples[key], self.transform, self.examples.skip_corrupt)
        epoch, position, index = key
        following = (self.examples[(index + i) % len(self.examples)] for i in range(len(self.examples)))
        return _readable(following, self.transform, self.examples.skip_corrupt, (self.seed, epoch, position))


class StreamPosition:
    """Epoch and first batch; in shared memory, where worker processes that exist already read them."""

    def __init__(self):
        self.shared = torch.zeros(2, dtype=torch.int64).share_memory_()

    def set(self, epoch: int, start: int) -> None:
        self.shared.copy_(torch.tensor([epoch, start]))

    def get(self) -> list[int]:
        return self.shared.tolist()


class Streamed(IterableDataset):
    """The batches of a worker: pass after pass in training, once in evaluation (without a position)."""

    def __init__(
        self,
        stream: Stream,
        transform: Transform,
        partition: Partition,
        batch_size: int,
        position: StreamPosition | None = None,
        seed: int = 0,
    ):
        self.stream = stream
        self.transform = transform
        self.partition = partition
        self.batch_size = batch_size
        self.position = position
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info, partition = get_worker_info(), self.partition
        if info:
            partition = replace(partition, worker=info.id, num_workers=info.num_workers)
        if self.position is None:
            samples = self.stream.samples(None, partition)
            while batch := list(islice(samples, self.batch_size)):
                yield collate(
                    [_prepare(sample, self.transform, self.stream.skip_corrupt) for sample in batch]
                )
            return
        epoch, start = self.position.get()
        # The loader asks its workers in turn: this one's batches are number worker, worker + num_workers, ...
        first = len(range(partition.worker, start, partition.num_workers)) * self.batch_size
        if partition.worker < start % partition.num_workers:
            yield {}  # its next batch comes after `start`; the loader's first round is not complete
        samples = islice(self._passes(epoch, partition), first, None)
        ahead: list[Sample] = []  # what was read to replace corrupt images, and is still to come itself
        part = partition.rank * partition.num_workers + partition.worker
        for position in count(first, self.batch_size):
            seeds = [(self.seed, epoch, position + i, part) for i in range(self.batch_size)]
            yield collate([self._item(samples, ahead, words) for words in seeds])

    def _item(self, samples: Iterator[Sample], ahead: list[Sample], seeds: tuple[int, ...]) -> dict[str, Any]:
        item = _readable(_remembered(samples, ahead), self.transform, self.stream.skip_corrupt, seeds)
        ahead.pop(0)
        return item

    def _passes(self, epoch: int, partition: Partition) -> Iterator[Sample]:
        for number in count():
            sample = None
            for sample in self.stream.samples((self.seed, epoch + number * 2**20), partition):
                yield sample
            if sample is None:
                remedy = "fewer workers or processes, or more shards, are needed"
                raise DataError(f"a share of the stream is empty: {remedy}")


def _remembered(samples: Iterator[Sample], ahead: list[Sample]) -> Iterator[Sample]:
    """Yield the samples in `ahead`, then further ones, which are added to it."""
    yield from ahead.copy()
    for sample in islice(samples, MOST_CORRUPT):
        ahead.append(sample)
        yield sample


def _readable(
    following: Iterable[Sample], transform: Transform, skip_corrupt: bool, seeds: tuple[int, ...]
) -> dict[str, Any]:
    """Return the first of the samples that can be read; its `corrupt` reports the ones before it."""
    corrupt: dict[str, str] = {}
    for sample in following:
        with seeded(*seeds):
            item = _prepare(sample, transform, skip_corrupt)
        corrupt |= item["corrupt"]
        if "labels" in item:
            return item | {"corrupt": corrupt}
    first = next(iter(corrupt.values()))
    raise DataError(f"{len(corrupt)} images in a row cannot be read: {first}, and so on")


def _prepare(sample: Sample, transform: Transform, skip_corrupt: bool) -> dict[str, Any]:
    """Return the transformed image and its label; for a corrupt image that may be skipped, only a message."""
    try:
        takes_sample = getattr(transform, "takes_sample", False)
        transformed = transform(sample) if takes_sample else _transformed(sample, transform)
    except DataError as error:
        if not skip_corrupt:
            raise
        return {"corrupt": {sample.name: str(error)}}
    item = transformed if isinstance(transformed, dict) else {"pixel_values": transformed}
    return {"labels": sample.label, **item, "corrupt": {}}


def _transformed(sample: Sample, transform: Transform) -> Any:
    image = open_image(sample.image, sample.name)
    try:
        return transform(image)
    except DataError as error:
        raise DataError(f"cannot use the image {sample.name}: {error}") from error


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch of the items that could be read, and the messages on the others.

    A worker process keeps a batch of encoded files until it has made the next one: then the main process,
    which decodes them, has copied them to pinned memory, and does not stand still to free them
    (docs/notes/shared-memory.md).
    """
    corrupt = {name: message for item in items for name, message in item.pop("corrupt").items()}
    items = [item for item in items if item]
    packed = {}
    if items and items[0]["pixel_values"].ndim == 1:  # encoded files, of unequal lengths
        files = [item.pop("pixel_values") for item in items]
        out = None
        if get_worker_info():  # where the process that waits for it finds it, as default_collate does
            storage = torch.UntypedStorage._new_shared(sum(map(len, files)), device="cpu")
            out = torch.empty(0, dtype=torch.uint8).set_(storage)
        packed["pixel_values"] = torch.cat(files, out=out)
    batch = {**(default_collate(items) if items else {}), **packed, "corrupt": corrupt}
    # by the other strategy the memory would outlive a worker that ends at once
    if packed and get_worker_info() and torch.multiprocessing.get_sharing_strategy() == "file_descriptor":
        _last_files.append(batch)
    return batch


def make_loader(
    dataset, workers: int, start_method: str | None = None, persistent: bool = True, **options
) -> DataLoader:
    """Make a loader whose worker processes end with this one alone; `options` are those of `DataLoader`."""
    if workers:
        options |= {"num_workers": workers, "persistent_workers": persistent, "worker_init_fn": _start_worker}
        options["multiprocessing_context"] = start_method
    if start_method == "forkserver":
        multiprocessing.set_forkserver_preload([__name__, f"{__package__}.augmentation", "datasets"])
    # a generator of its own: otherwise each epoch would draw a seed from torch's global one
    return DataLoader(dataset, generator=torch.Generator(), **options)


def delivered(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield a loader's batches.

    Raises:
        DataError: in one line: the batches of its worker processes do not fit into shared memory.
    """
    try:
        yield from loader
    except RuntimeError as error:
        if "unable to allocate shared memory" not in str(error) and "Bus error" not in str(error):
            raise
        raise DataError(
            "the batches of the worker processes do not fit into shared memory (/dev/shm): give a container "
            "more of it (docker run --shm-size=8g), or take fewer --workers; 0 needs none"
        ) from error


def end_workers(loader: DataLoader) -> None:
    """End a loader's worker processes; left to the interpreter's exit, PyTorch waits 5 seconds for each."""
    if (workers := getattr(loader, "_iterator", None)) is not None:
        workers._shutdown_workers()


def _start_worker(worker: int) -> None:
    """Give a worker one thread, and let the main process alone end it.

    The main process has still to save when others say that all shall end. A process group of its own keeps
    off Ctrl-C and signals to the group; `_end_by_parent` deals with signals to each process of a job.
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
