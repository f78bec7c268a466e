"""Batches as worker processes read them, and what is pinned of them."""

from unittest import mock

import torch

from flashkat_hf.inference.pictures import ReadBatch


def test_pixels_alone_are_pinned():
    pixels, crop = torch.zeros(4, dtype=torch.uint8), torch.zeros(1, 10)
    batch = ReadBatch(part=3, errors=[None], inputs={"pixel_values": pixels, "crop": crop, "corrupt": {}})
    with mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor + 1):  # needs no GPU
        pinned = batch.pin_memory()
        nothing = ReadBatch(batch, inputs=None)
        assert nothing.pin_memory() == nothing
    assert pinned == {**batch, "inputs": {**batch["inputs"], "pixel_values": mock.ANY}}
    assert pinned["inputs"]["pixel_values"].tolist() == [1] * 4
    assert pinned["inputs"]["crop"] is crop
    assert batch["inputs"]["pixel_values"] is pixels
