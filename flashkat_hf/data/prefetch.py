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
    """What `make` makes of each batch, in order.

    In the background while the caller is busy with the ones before.

    On a GPU `decode`, which waits for the GPU more than it works, is applied before `make` in a thread of its
    own. There, the batches and `make` must draw nothing from this process's global generators. An error of
    theirs comes where the batch would have come. Close the iterator when it is left early: that ends the
    thread.
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
        ready = threads.enter_context(closing(in_background(_on_a_stream(batches, make, _stream(device)))))
        for made, event in ready:
            current = torch.cuda.current_stream(device)
            current.wait_event(event)
            for tensor in made.values():
                tensor.record_stream(current)  # its memory is not reused before the step is done with it
            yield made


def moved(device: torch.device, batch: Batch) -> Batch:
    """The batch on the device; from pinned memory without waiting."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _on_a_stream(
    batches: Iterable[Batch], make: Callable[[Batch], Batch], stream: torch.cuda.Stream
) -> Iterator[tuple[Batch, torch.Event]]:
    """Each made batch, and what tells that the GPU has it."""
    for batch in batches:
        with torch.cuda.stream(stream):
            made, event = make(batch), stream.record_event()
        yield made, event


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: memory is kept for each stream apart.

    Its small kernels go before the step's large ones.
    """
    return torch.cuda.Stream(device, priority=-1)


def in_background(items: Iterable[Item], depth: int = DEPTH) -> Generator[Item, None, None]:
    """The items, drawn in a thread that is `depth` ahead.

    What is raised there is raised here, in its place.
    """
    ready: queue.Queue = queue.Queue(depth)
    left = threading.Event()

    def put(*found: object) -> None:
        while not left.is_set():
            try:
                return ready.put(found, timeout=0.1)
            except queue.Full:
                pass

    def draw() -> None:
        try:
            for item in items:
                put(item, None)
                if left.is_set():
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
        left.set()
        thread.join()
