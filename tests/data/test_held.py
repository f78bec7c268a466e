"""Small images that are held on a device: shifts and mirror images, order, parts, resuming, corrupt files."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from data_helpers import PROCESSOR, write_folder
from PIL import Image
from torchvision.transforms import functional

from flashkat_hf.data import open_data
from flashkat_hf.data.augmentation import SIGNS, Augmentation, batch_transform, training_transform
from flashkat_hf.data.batches import TrainBatches
from flashkat_hf.data.gpu.shifting import SHIFT, Shifting
from flashkat_hf.data.held import HeldBatches
from flashkat_hf.data.samples import DataError

EVERYTHING = replace(SIGNS, crop="shifts", on_device="everything")


def held(split, rank=0, world_size=1, augmentation=EVERYTHING, device="cpu", **options) -> HeldBatches:
    options = {"batch_size": 3, "seed": 5, **options}
    shifting = batch_transform(PROCESSOR, augmentation).to(device)
    transform = training_transform(PROCESSOR, augmentation)
    return HeldBatches(split, transform, shifting, rank=rank, world_size=world_size, **options)


def equal(one: list[dict], other: list[dict]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in ("pixel_values", "labels"))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return open_data(write_folder(tmp_path_factory.mktemp("folder"), 23, 4)).train


def test_what_torchvision_does(device):
    """Shifts of whole pixels, then the middle, mirror images, normalisation, as workers do it.

    What comes into the picture is black, or the image's own where it is larger.
    """
    (height, width), mean, std = (40, 60), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    pictures = [
        torch.randint(256, size, dtype=torch.uint8) for size in ((40, 60, 3), (50, 60, 3), (40, 90, 3))
    ]
    images = [Image.fromarray(picture.numpy()) for picture in pictures]
    shifting = Shifting(mean, std, (height, width), flip=0.5).to(device)
    held = [functional.pil_to_tensor(functional.center_crop(image, shifting.held_size)) for image in images]
    draws = torch.tensor([[0.0, 0.999, 0.4], [0.5, 0.5, 0.6], [0.9, 0.1, 0.0]])
    made = shifting(torch.stack(held).permute(0, 2, 3, 1).to(device), torch.tensor([2, 0, 1]), draws)
    for pixels, number, (down, right, mirrored) in zip(made, (2, 0, 1), draws.tolist(), strict=True):
        shift = [round((2 * right - 1) * SHIFT * width), round((2 * down - 1) * SHIFT * height)]
        moved = functional.affine(images[number], 0, shift, 1.0, [0.0, 0.0])
        moved = functional.center_crop(moved, [height, width])
        moved = functional.hflip(moved) if mirrored < 0.5 else moved
        expected = functional.normalize(functional.to_tensor(moved), mean, std)
        torch.testing.assert_close(pixels.cpu(), expected, rtol=0, atol=1e-5)


def test_each_shift_is_as_frequent_as_torchvisions():
    draws = Shifting.draws(0, 0, 100_000)
    counts = ((2 * draws[:, 0] - 1) * SHIFT * 28).round().unique(return_counts=True)
    assert counts[0].tolist() == [-1, 0, 1]  # up to 1.4 pixels
    assert counts[1].tolist() == pytest.approx([0.9e5 / 2.8, 1e5 / 2.8, 0.9e5 / 2.8], rel=0.02)
    assert not torch.equal(draws, Shifting.draws(0, 1, 100_000))


def test_the_order_is_that_of_other_ways(split):
    other = TrainBatches(split, training_transform(PROCESSOR, SIGNS), batch_size=3, seed=5)
    mine = held(split)
    assert len(mine) == len(other) == 7
    for epoch in (0, 3):
        pairs = zip(mine.epoch(epoch), other.epoch(epoch), strict=True)
        assert all(torch.equal(a["labels"], b["labels"]) for a, b in pairs)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_resume_and_differ(split, workers):
    batches = held(split, workers=workers)
    whole = list(batches.epoch(2))
    assert equal(whole[3:], list(held(split).epoch(2, 3)))
    assert equal(whole, list(batches.epoch(2)))
    assert not equal(whole, list(batches.epoch(1)))
    assert whole[0]["pixel_values"].shape[:2] == (3, 3)
    assert tuple(whole[0]["pixel_values"].shape[2:]) == batches.shifting.size
    assert whole[0]["pixel_values"].dtype == torch.float32


def test_processes_share_the_batches_of_one(split):
    parts = [list(held(split, rank, 2).epoch(1)) for rank in range(2)]
    whole = list(islice(held(split, batch_size=6).epoch(1), 3))
    together = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(*parts, strict=True)]
    assert equal(together, whole)


def test_corrupt_images(tmp_path):
    root = write_folder(tmp_path, 9, 3)
    bad = root / "train" / "bee" / "001.png"
    bad.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"^cannot read the image .*001\.png"):
        next(held(open_data(root).train).epoch(0))
    batches = held(open_data(root, skip_corrupt=True).train)
    labels = torch.cat([batch["labels"] for batch in batches.epoch(0)])
    assert len(labels) == 9
    assert batches.corrupt.keys() == {str(bad)}


def test_what_is_held_and_what_is_not():
    cuda, cpu, plain = torch.device("cuda"), torch.device("cpu"), replace(EVERYTHING, on_device="auto")
    assert plain.resolved(cuda, in_memory=False, num_bytes=2**30) == EVERYTHING
    assert plain.resolved(cpu, in_memory=False, num_bytes=2**20).on_device == "nothing"
    for other, num_bytes in ((plain, 2**30 + 1), (plain, None), (replace(plain, crop="moves"), 0)):
        assert other.resolved(cuda, in_memory=True, num_bytes=num_bytes).on_device == "nothing"
    with pytest.raises(ValueError, match=r"holds all images, but a stream is read; use 'auto'"):
        EVERYTHING.resolved(cpu, in_memory=False)
    with pytest.raises(ValueError, match=r"would hold 2\.5 GiB, more than 1; use 'auto'"):
        EVERYTHING.resolved(cpu, in_memory=False, num_bytes=5 * 2**29)
    given = ("the crop 'random'", {}), ("erasing", {"crop": "shifts", "rand_augment": None})
    for what, values in given:
        with pytest.raises(ValueError, match=f"and mirror images, not {what}; use 'auto'"):
            Augmentation(on_device="everything", **values)
