"""The kernels that resize parts of images, by their launcher and in the groups that fit the memory."""

import numpy
import pytest
import torch
from data_helpers import encoded_files, encoded_picture, images_of
from helpers import KERNEL_DEVICES
from torchvision.transforms.v2 import InterpolationMode, functional

from flashkat_hf.data.gpu import decoding
from flashkat_hf.data.gpu.records import Crops, DecodedImages
from flashkat_hf.data.gpu.triton_crops import resized_crops

pytestmark = pytest.mark.parametrize("device", KERNEL_DEVICES)


@pytest.mark.parametrize("size", [(20, 24), (7, 40), (1, 1)])
@pytest.mark.parametrize("bicubic", [False, True])
def test_parts_are_torchvisions(bicubic, size, device):
    """Larger and smaller than the result, down to one pixel, of images of all sizes, mirrored or not."""
    mode = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
    generator = torch.Generator().manual_seed(0)
    images, windows, expected = [], [], []

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    for number in range(4):
        height, width = draw(1, 60), draw(1, 60)
        rows, columns = draw(1, height), draw(1, width)
        window = draw(0, height - rows), draw(0, width - columns), rows, columns
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        crop = functional.resized_crop(image.double(), *window, list(size), mode, antialias=True)
        expected.append((crop.flip(-1) if number % 2 else crop).clamp(0, 255))
        images.append(image.to(device))
        windows.append((*window, bicubic, number % 2))
    made = resized_crops(DecodedImages.of(images), Crops.unpacked(torch.tensor(windows)), size)
    assert made.dtype == torch.uint8
    assert (made.cpu() - torch.stack(expected)).abs().max() <= 0.5 + 1e-4  # rounded once


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("limit", [2**28, 10_000])
def test_crops_of_a_batch_are_torchvisions(limit, bicubic, device, monkeypatch):
    """Larger and smaller than the result, of files of all sizes, mirrored or not; few at once, or all."""
    monkeypatch.setattr(decoding, "CROP_BYTES", limit)
    mode = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
    generator = numpy.random.default_rng(0)
    files, windows, expected = [], [], []
    count, largest = (6, 50) if device == "cpu" else (70, 120)  # on a GPU more than are decoded at once
    for seed in range(count):
        width, height = generator.integers(20, largest, 2).tolist()
        rows, columns = generator.integers(4, [height + 1, width + 1]).tolist()
        top, left = generator.integers(0, [height - rows + 1, width - columns + 1]).tolist()
        files.append(encoded_picture(seed, (width, height), quality=95))
        windows.append([top, left, rows, columns, bicubic, seed % 2])
    images = decoding.decode_files(encoded_files(files), torch.device(device))
    for image, (*window, _, mirrored) in zip(images_of(images), windows, strict=True):
        crop = functional.resized_crop(image.double(), *window, [32, 24], mode, antialias=True)
        expected.append((crop.flip(-1) if mirrored else crop).clamp(0, 255))
    made = decoding.crop_images(images, Crops.unpacked(torch.tensor(windows)), (32, 24))
    assert made.dtype == torch.uint8
    assert (made - torch.stack(expected)).abs().max() <= 0.5 + 1e-3  # rounded once
