"""Batches made ahead of the training step: in a background thread, on a GPU stream of its own."""

import functools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from typing import Any, TypeVar

import torch
from torch import Tensor

DEPTH = 2  # batches that are ready at most
Batch = dict[str, Tensor]
Item = TypeVar("Item")


def made_ahead(
    batches: Iterable[Batch],
    make: Callable[[Batch], Batch],
    device: torch.device,
    background: bool,
    decode: Callable[[Batch], Any] | None = None,
) -> Generator[Batch, None, None]:
    """Yield what `make` makes of each batch, in order; in the background while the caller uses earlier ones.

    On a GPU `decode`, which waits for the GPU more than it works, is applied before `make` in a thread of its
    own. There, the batches and `make` must draw nothing from this process's global generators. An error of
    theirs comes where the batch would have come. Close the iterator when it is not read to its end: that ends
    the threads.
    """
    if not background:
        yield from map(make, batches)
        return
    with ExitStack() as threads:
        if device.type != "cuda":
            yield from threads.enter_context(closing(in_background(map(make, batches))))
            return
        if decode is not None:
            batches = threads.enter_context(closing(in_background(map(decode, batches), depth=1)))
        ready = threads.enter_context(
            closing(in_background(_on_a_stream(batches, make, batch_stream(device))))
        )
        for batch, event in ready:
            current = torch.cuda.current_stream(device)
            current.wait_event(event)
            for tensor in batch.values():
                tensor.record_stream(current)  # its memory is not reused before the step is done with it
            yield batch


def moved(device: torch.device, batch: Batch) -> Batch:
    """Return the batch on the device; from pinned memory without waiting."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _on_a_stream(
    batches: Iterable[Batch], make: Callable[[Batch], Batch], stream: torch.cuda.Stream
) -> Iterator[tuple[Batch, torch.Event]]:
    """Yield what `make` makes of each batch, and the event after which the GPU has it."""
    for batch in batches:
        with torch.cuda.stream(stream):
            result, event = make(batch), stream.record_event()
        yield result, event


@functools.cache
def batch_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the device's stream for all epochs: memory is kept for each stream apart.

    Its small kernels go before the step's large ones.
    """
    return torch.cuda.Stream(device, priority=-1)


def in_background(items: Iterable[Item], depth: int = DEPTH) -> Generator[Item, None, None]:
    """Yield the items, drawn in a thread that is `depth` ahead; its error is raised here, in its place."""
    ready: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not closed.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                pass

    def draw() -> None:
        try:
            for item in items:
                put(item)
                if closed.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:  # the caller's to handle
            put(None, error)

    thread = threading.Thread(target=draw, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()
