"""Batches made ahead of the step.

The same batches, and whatever goes wrong comes to the one who takes them.
"""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from flashkat_hf.data.prefetch import DEPTH, in_background, made_ahead


def no_threads() -> bool:
    return all(thread.name != "batches" for thread in threading.enumerate())


def test_all_items_in_order():
    assert list(in_background(range(20))) == list(range(20))
    assert list(in_background([])) == []
    assert no_threads()


def test_items_are_drawn_ahead_in_another_thread():
    drawn: list[int] = []

    def items() -> Iterator[str]:
        for number in range(1000):
            drawn.append(number)
            yield threading.current_thread().name

    taken = in_background(items())
    assert next(taken) == "batches"
    deadline = time.monotonic() + 10
    while len(drawn) < 2 + DEPTH and time.monotonic() < deadline:  # taken, ready, and one that waits for room
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(drawn) == 2 + DEPTH
    taken.close()
    assert no_threads()


def broken() -> Iterator[int]:
    yield from range(3)
    raise OSError("the disk is gone")


def test_an_error_comes_after_the_items_before():
    taken = in_background(broken())
    assert [next(taken) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(taken)
    assert no_threads()


def test_an_error_before_the_first_item():
    with pytest.raises(TypeError, match="not iterable"):
        next(in_background(5))
    assert no_threads()


def doubled(device: str):
    return lambda batch: {name: tensor.to(device, non_blocking=True) * 2 for name, tensor in batch.items()}


@pytest.mark.parametrize("background", [False, True])
def test_made_batches(background, device):
    batches = ({"pixel_values": torch.full((1000, 1000), float(number))} for number in range(20))
    totals, decoders = [], set()

    def decode(batch):
        decoders.add(threading.current_thread())
        return batch

    for batch in made_ahead(batches, doubled(device), torch.device(device), background, decode):
        assert batch["pixel_values"].device.type == device
        product = (
            batch["pixel_values"] @ batch["pixel_values"]
        )  # a step, after which its memory may be reused
        totals.append((product[0, 0] / 1000).sqrt())
    assert torch.stack(totals).tolist() == pytest.approx([2.0 * number for number in range(20)])
    assert no_threads()
    assert len(decoders) == (
        1 if background and device == "cuda" else 0
    )  # a thread of its own, where it helps


@pytest.mark.parametrize("background", [False, True])
def test_made_batches_and_an_error(background, device):
    batches = ({"labels": torch.tensor([number])} for number in broken())
    made = made_ahead(batches, doubled(device), torch.device(device), background)
    assert [next(made)["labels"].item() for _ in range(3)] == [0, 2, 4]
    with pytest.raises(OSError, match="the disk is gone"):
        next(made)
