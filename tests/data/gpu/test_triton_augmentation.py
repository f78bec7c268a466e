"""The kernels that carry out plans, by their launcher: PIL's pixels, and those of PyTorch's operations."""

import pytest
import timm.data.auto_augment as auto_augment
import torch
from data_helpers import one_operation, smooth_picture, stacked
from helpers import KERNEL_DEVICES

from flashkat_hf.data.batches import seeded
from flashkat_hf.data.gpu.augmentation import STRIDE, BatchAugmentation, Draws, drawing
from flashkat_hf.data.gpu.triton_augmentation import augmented

pytestmark = pytest.mark.parametrize("device", KERNEL_DEVICES)
SIZE = (30, 36)  # no multiple of a block
MODULE = BatchAugmentation((0.5, 0.4, 0.3), (0.2, 0.3, 0.25), SIZE)


def carried_out(images: torch.Tensor, plans: torch.Tensor, device: str) -> torch.Tensor:
    """Normalised pixels."""
    module = BatchAugmentation((0.5, 0.4, 0.3), (0.2, 0.3, 0.25), SIZE).to(device)
    plan, num_layers = module.full_plan(plans)
    buffers = module.outside, module.mean, module.std, module.noise
    return augmented(images.to(device, copy=True), plan.to(device), num_layers, *buffers, STRIDE).cpu()


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
def test_plans_are_carried_out_as_by_pytorch(num_layers, device):
    """Of layers with operations of all kinds and none, and erased boxes.

    Cubic filters left out, which differ.
    """
    generator = torch.Generator().manual_seed(num_layers)
    images = stacked([smooth_picture(seed, SIZE[::-1]) for seed in range(48)])
    plans = []
    for seed in range(48):
        with seeded(seed):
            layer = auto_augment.rand_augment_transform(
                f"rand-m9-n{num_layers}", {"img_mean": tuple(MODULE.fill)}
            )
            plans.append(Draws(drawing(layer) if num_layers else None, None, SIZE).plan())
    plans = torch.stack(plans)
    plans[:, 2 : 3 * num_layers : 3] = 2.0  # bilinear
    plans[::2, -5:-1] = torch.tensor([3.0, 5.0, 20.0, 11.0])
    plans[:, -1] = torch.randint(0, 2**24, (48,), generator=generator).float()
    made = carried_out(images, plans, device)
    expected = MODULE({"pixel_values": images, "plan": plans, "labels": torch.zeros(48)})["pixel_values"]
    erased = torch.zeros(48, 1, *SIZE, dtype=torch.bool)
    erased[::2, :, 3:23, 5:16] = True
    assert torch.equal(made.where(erased, 0), expected.where(erased, 0))  # the same noise
    error = (levels(made) - levels(expected)).abs()
    assert (error > 1e-3).float().mean() < 1e-3 * num_layers + 1e-9
