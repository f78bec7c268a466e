"""Small images that a device holds, all of them: they are shifted, mirrored and normalised there."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..seeding import random_integer
from .augmentation import Normalising

SHIFT = 0.05  # of a side, at most
HELD_BYTES = 2**30  # of all images of a data set


class Shifting(Normalising):
    """Makes batches of images that are held, with a border, on the device that it is on.

    Attributes:
        held_size: height and width of what is held: with what a shift brings into the picture.
        flip: probability of a mirror image.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], size: tuple[int, int], flip: float):
        super().__init__(mean, std, size)
        self.held_size = held_size(size)
        self.flip = flip

    @staticmethod
    def draws(seed: int, epoch: int, count: int) -> Tensor:
        """Return an epoch's random numbers, `(count, 3)` in [0, 1), on the CPU: a row for each position."""
        generator = torch.Generator().manual_seed(random_integer(seed, epoch, 1) >> 1)
        return torch.rand(count, 3, generator=generator)

    def forward(self, held: Tensor, indices: Tensor, draws: Tensor) -> Tensor:
        """Return a batch, normalised: `(batch, channels, height, width)` float32.

        Args:
            held: `(images, *held_size, channels)` uint8, on the device.
            indices: `(batch,)`, of the images of the batch.
            draws: `(batch, 3)`: of the shift down and to the right, up to `SHIFT` of a side in whole pixels,
                and of mirroring.
        """
        (height, width), (held_height, held_width) = self.size, self.held_size
        shift = (2 * draws[:, :2] - 1) * SHIFT * torch.tensor([height, width])
        mirrored = draws[:, 2:] < self.flip
        indices, shift, mirrored = (
            tensor.to(held.device, non_blocking=True) for tensor in (indices, shift.round().long(), mirrored)
        )
        rows = torch.arange(height, device=held.device) + (held_height - height) // 2 - shift[:, :1]
        columns = torch.arange(width, device=held.device).expand(len(indices), -1)
        columns = torch.where(mirrored, columns.flip(1), columns) + (held_width - width) // 2 - shift[:, 1:]
        pixels = held[indices[:, None, None], rows[:, :, None], columns[:, None]]
        return self.normalised(pixels.permute(0, 3, 1, 2))


def held_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width that are held of images which are shifted by up to `SHIFT` of a side."""
    height, width = (side + 2 * math.ceil(SHIFT * side) for side in size)
    return height, width
