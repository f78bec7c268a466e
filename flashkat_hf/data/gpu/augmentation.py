"""Augmentation in batches on a device: decoding and cropping on request, RandAugment, normalisation, erasing.

Worker processes draw what timm draws, by running timm's own RandAugment and RandomErasing on stand-ins that
note what would be done. The draws travel with the batch as a small tensor, and the module here carries them
out by Triton kernels. So a batch is the same function of (seed, epoch, position) as without it, and the
operations and their ranges are timm's; pixels differ from PIL's by rounding.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .decoding import crop_images, decode_files
from .records import DecodedImages, EncodedCrops, Plan, Windows

try:
    from .triton_augmentation import augmented, interpreted
except ImportError:  # no triton: worker processes do everything
    augmented = interpreted = cast(Any, None)

NOISE = 2**22  # normal numbers for erased boxes
STRIDE = 7919  # from one seed's place in the noise to the next
AHEAD_BYTES = 2**26  # of files that are decoded at once, and of a batch's that are before it is needed


def missing_for_kernels(device: torch.device) -> str | None:
    """Return what the kernels need and a device does not have, or None."""
    if augmented is None:
        return "the package triton"
    return None if device.type == "cuda" or interpreted() else "a GPU"


class Normalising(nn.Module):
    """Base of what makes the pixel values of a batch on the device that it is on.

    Attributes:
        size: height and width of the result.
        mean: `(3, 1, 1)`, to normalise levels from 0 to 255.
        std: likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], size: tuple[int, int]):
        super().__init__()
        self.size = size
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None])

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return pixel values of levels `(batch, 3, height, width)`, float32."""
        return (pixels.float() - self.mean) / self.std


class BatchOfCrops(Normalising):
    """Makes the pixels of a batch: JPEG files decoded, cropped and resized."""

    def decode(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with its JPEG files decoded, for a thread that runs ahead of the module's calls.

        A batch of large files stays as it is: their images would take too much memory.
        """
        if "crop" not in batch or batch["pixel_values"].numel() > AHEAD_BYTES:
            return batch
        return {**batch, "decoded": list(self._decoded(batch))}

    def _decoded(self, batch: dict[str, Any]) -> Iterator[tuple[Tensor, DecodedImages]]:
        """Yield numbers and images of what came as JPEG files, `AHEAD_BYTES` of files at a time."""
        crops = EncodedCrops.unpacked(batch["crop"])
        files, encoded = crops.files(batch["pixel_values"]), (crops.height > 0).nonzero()[:, 0]
        group = files.start[encoded] // AHEAD_BYTES
        for number in group.unique():
            numbers = encoded[group == number]
            yield numbers, decode_files(files[numbers], self.mean.device)

    def crops(self, batch: dict[str, Any]) -> Tensor:
        """Return the crops of files, and those that workers have made, `(batch, 3, height, width)` uint8."""
        crops, device, data = EncodedCrops.unpacked(batch["crop"]), self.mean.device, batch["pixel_values"]
        count = len(crops.height)
        windows = Windows.unpacked(batch["window"]) if "window" in batch else None
        result = torch.empty(count, 3, *self.size, dtype=torch.uint8, device=device)
        for numbers, images in batch.get("decoded") or self._decoded(batch):
            cropped = crop_images(images, crops[numbers], self.size, windows and windows[numbers])
            if len(numbers) == count:
                return cropped
            result[numbers.to(device)] = cropped
        starts = crops.files(data).start.tolist()
        for number in (crops.height == 0).nonzero()[:, 0].tolist():
            pixels = data[starts[number] : starts[number] + crops.length[number]]
            result[number] = pixels.unflatten(0, (3, *self.size)).to(device, non_blocking=True)
        return result


class BatchAugmentation(BatchOfCrops):
    """Carries out the plans of a batch on the device that it is on.

    Takes what `TrainBatches` gives with a `PlannedPart`, on the CPU, and returns `{"pixel_values": (batch, 3,
    height, width) float32, normalised, "labels": (batch,) int64}`. Draws nothing from global generators.
    """

    outside: Tensor
    noise: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], size: tuple[int, int]):
        super().__init__(mean, std, size)
        self.fill = [min(255, round(255 * value)) for value in mean]  # timm's
        noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0))
        self.register_buffer("outside", torch.tensor(self.fill, dtype=torch.float32)[:, None, None])
        self.register_buffer("noise", noise, persistent=False)

    @torch.no_grad()
    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Make a batch.

        Raises:
            ValueError: the module is on a CPU, or triton is missing.
        """
        device, plan = self.mean.device, Plan.unpacked(batch["plan"])
        if missing := missing_for_kernels(device):
            raise ValueError(f"augmentation in batches needs {missing}; use on_device='nothing'")
        if "crop" in batch:
            images = self.crops(batch)
        else:
            images = batch["pixel_values"].to(device, non_blocking=True, copy=True)
        rows = plan.for_kernels(self.size).to(device, non_blocking=True)
        buffers = self.outside, self.mean, self.std, self.noise
        pixels = augmented(images, rows, plan.num_layers, *buffers, STRIDE)
        return {"pixel_values": pixels, "labels": batch["labels"].to(device, non_blocking=True)}
