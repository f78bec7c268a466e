"""The kernels that carry out plans, by their launcher: PIL's pixels."""

import pytest
import timm.data.auto_augment as auto_augment
import torch
from data_helpers import by_pil, one_operation, smooth_picture, stacked
from helpers import KERNEL_DEVICES

from flashkat_hf.data.gpu.augmentation import NOISE, STRIDE, BatchAugmentation
from flashkat_hf.data.gpu.planning import Draws, drawing
from flashkat_hf.data.gpu.records import Plan
from flashkat_hf.data.gpu.triton_augmentation import augmented
from flashkat_hf.data.seeding import seeded

pytestmark = pytest.mark.parametrize("device", KERNEL_DEVICES)
SIZE = (30, 36)  # no multiple of a block
MODULE = BatchAugmentation((0.5, 0.4, 0.3), (0.2, 0.3, 0.25), SIZE)


def carried_out(images: torch.Tensor, plans: torch.Tensor, device: str) -> torch.Tensor:
    """Normalised pixels."""
    module = BatchAugmentation((0.5, 0.4, 0.3), (0.2, 0.3, 0.25), SIZE).to(device)
    plan = Plan.unpacked(plans)
    buffers = module.outside, module.mean, module.std, module.noise
    rows = plan.for_kernels(SIZE).to(device)
    return augmented(images.to(device, copy=True), rows, plan.num_layers, *buffers, STRIDE).cpu()


def levels(pixels: torch.Tensor) -> torch.Tensor:
    return pixels * MODULE.std + MODULE.mean


@pytest.mark.parametrize("name", auto_augment._RAND_TRANSFORMS)
@pytest.mark.parametrize("bicubic", [False, True])
def test_an_operation_is_pils(name, bicubic, device):
    """Bicubic turns, too.

    A place that float32 rounds to the other side of a level, or of the border, is another's.
    """
    images, expected, plans = one_operation(name, bicubic, MODULE.fill, SIZE, count=12)
    made = levels(carried_out(images, plans, device))
    error = (made - expected).abs().round()
    assert not torch.equal(made.round(), images.float())
    assert error.max() <= 1
    assert (error > 0).float().mean() < (0.005 if name.startswith(("Rotate", "Shear", "Translate")) else 1e-9)


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_plans_are_carried_out_as_by_pil(num_layers, device):
    """Layers with operations of all kinds and none, both filters, and erased boxes."""
    generator = torch.Generator().manual_seed(num_layers)
    pictures, plans = [smooth_picture(seed, SIZE[::-1]) for seed in range(48)], []
    options = {"img_mean": tuple(MODULE.fill)}
    for seed in range(48):
        with seeded(seed):
            layer = auto_augment.rand_augment_transform(f"rand-m9-n{num_layers}", options)
            plans.append(Draws(drawing(layer) if num_layers else None, None, SIZE).plan())
    plans = torch.stack(plans)
    plans[::2, -5:-1] = torch.tensor([3.0, 5.0, 20.0, 11.0])
    plans[:, -1] = torch.randint(0, 2**24, (48,), generator=generator).float()
    made = carried_out(stacked(pictures), plans, device)
    expected = stacked([by_pil(image, row, MODULE.fill) for image, row in zip(pictures, plans, strict=True)])
    erased = torch.zeros(48, 1, *SIZE, dtype=torch.bool)
    erased[::2, :, 3:23, 5:16] = True
    index = torch.arange(3 * SIZE[0] * SIZE[1]).view(3, *SIZE)
    noise = MODULE.noise[(plans[:, -1].long()[:, None, None, None] * STRIDE + index) % NOISE]
    assert torch.equal(made.where(erased, 0), noise.where(erased, 0))
    error = (levels(made) - expected).abs().where(~erased, 0)
    assert (error > 0.5).float().mean() < 1e-3 * num_layers + 1e-9
