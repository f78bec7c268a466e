"""Batches made ahead of the training step: in a background thread, on a stream of its own."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator

import torch
from torch import Tensor

DEPTH = 2  # batches that are ready at most
Batch = dict[str, Tensor]


def made_ahead(
    batches: Iterator[Batch], make: Callable[[Batch], Batch], device: torch.device
) -> Generator[Batch, None, None]:
    """What `make` makes of each batch, in order; on a GPU while the caller is busy with the ones before.

    `make` must draw nothing from global generators. Its error, or that of the batches, comes where the batch would have
    come. Close the iterator when it is left early: that ends the thread.
    """
    if device.type != "cuda":
        yield from map(make, batches)
        return
    ready: queue.Queue = queue.Queue(DEPTH)
    left = threading.Event()
    stream = torch.cuda.Stream(device)

    def work() -> None:
        torch.cuda.set_device(device)
        try:
            with torch.cuda.stream(stream):
                for batch in batches:
                    made = make(batch)
                    if not _put(ready, (made, stream.record_event()), left):
                        return
            _put(ready, None, left)
        except BaseException as error:  # the caller's thread raises it
            _put(ready, error, left)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while (found := ready.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            made, event = found
            current = torch.cuda.current_stream(device)
            current.wait_event(event)
            for tensor in made.values():
                tensor.record_stream(current)  # its memory is not reused before the step is done with it
            yield made
    finally:
        left.set()
        thread.join()


def _put(ready: queue.Queue, item: object, left: threading.Event) -> bool:
    """Whether the item found room before the caller left."""
    while not left.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
