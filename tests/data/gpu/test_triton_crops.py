"""The kernels that resize parts of images, by their launcher."""

import pytest
import torch
from helpers import KERNEL_DEVICES
from torchvision.transforms.v2 import InterpolationMode, functional

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
    places = torch.tensor([(image.data_ptr(), *image.shape[1:]) for image in images])
    made = resized_crops(places, torch.tensor(windows), size, torch.device(device))
    assert made.dtype == torch.uint8
    assert (made.cpu() - torch.stack(expected)).abs().max() <= 0.5 + 1e-4  # rounded once
