"""Batches made ahead of the step: the same batches, and whatever goes wrong comes to the one who takes them."""

import threading
import time

import pytest
import torch

from flashkat_hf.ahead import DEPTH, made_ahead


def numbered(count: int, drawn: list[int] | None = None):
    for number in range(count):
        if drawn is not None:
            drawn.append(number)
        yield {"pixel_values": torch.full((1000, 1000), float(number))}


def doubled(device):
    return lambda batch: {name: tensor.to(device, non_blocking=True) * 2 for name, tensor in batch.items()}


def test_all_batches_in_order(device):
    made = made_ahead(numbered(20), doubled(device), torch.device(device))
    totals = []
    for batch in made:
        assert batch["pixel_values"].device.type == device
        work = batch["pixel_values"] @ batch["pixel_values"]  # the step; its memory may be reused afterwards
        totals.append((work[0, 0] / 1000).sqrt())
    assert torch.stack(totals).tolist() == pytest.approx([2.0 * number for number in range(20)])
    assert all(thread.name != "batches" for thread in threading.enumerate())


def test_leaving_early_ends_the_thread(device):
    drawn: list[int] = []
    made = made_ahead(numbered(1000, drawn), doubled(device), torch.device(device))
    next(made)
    time.sleep(0.3)
    assert len(drawn) <= 1 + DEPTH + 1  # taken, ready, and one that waits for room
    made.close()
    assert all(thread.name != "batches" for thread in threading.enumerate())


@pytest.mark.parametrize("where", ["batches", "make"])
def test_errors_come_after_the_batches_before(where, device):
    def broken():
        yield from numbered(3)
        raise OSError("the disk is gone")

    def make(batch):
        if where == "make" and batch["pixel_values"][0, 0] == 3:
            raise OSError("the disk is gone")
        return doubled(device)(batch)

    made = made_ahead(broken() if where == "batches" else numbered(9), make, torch.device(device))
    for _ in range(3):
        next(made)
    with pytest.raises(OSError, match="the disk is gone"):
        next(made)
