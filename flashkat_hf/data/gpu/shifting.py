"""Small images that a device holds, all of them: they are shifted, mirrored and normalised there."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..seeding import random_integer

SHIFT = 0.05  # of a side, at most
HELD_BYTES = 2**30  # of all images of a data set


class Shifting(nn.Module):
    """Makes batches of images of one size that are held on the device that it is on.

    Args:
        mean: of normalisation, of levels from 0 to 1.
        std: likewise.
        flip: probability of a mirror image.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], flip: float):
        super().__init__()
        self.flip = flip
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None])

    @staticmethod
    def draws(seed: int, epoch: int, count: int) -> Tensor:
        """Return an epoch's random numbers, `(count, 3)` in [0, 1), on the CPU: a row for each position."""
        generator = torch.Generator().manual_seed(random_integer(seed, epoch, 1) >> 1)
        return torch.rand(count, 3, generator=generator)

    def forward(self, held: Tensor, indices: Tensor, draws: Tensor) -> Tensor:
        """Return a batch, normalised: `(batch, channels, height, width)` float32.

        Args:
            held: `(images, height, width, channels)` uint8, on the device.
            indices: `(batch,)`, of the images of the batch.
            draws: `(batch, 3)`: of the shift down and to the right, up to `SHIFT` of a side in whole pixels,
                and of mirroring. Where an image has moved away it is black.
        """
        height, width = held.shape[1:3]
        indices, draws = (tensor.to(held.device, non_blocking=True) for tensor in (indices, draws))
        sides = torch.tensor([height, width], device=held.device)
        down, right = ((2 * draws[:, :2] - 1) * SHIFT * sides).round().long().unbind(1)
        rows = torch.arange(height, device=held.device) - down[:, None]
        columns = torch.arange(width, device=held.device).expand(len(indices), -1)
        columns = torch.where(draws[:, 2:] < self.flip, columns.flip(1), columns) - right[:, None]
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
        places = rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
        pixels = held[indices[:, None, None], *places] * inside[..., None]
        return (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std
