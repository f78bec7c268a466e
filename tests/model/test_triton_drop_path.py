"""The kernel of stochastic depth against its formula."""

import pytest
import torch
from helpers import KERNEL_DEVICES

from flashkat_hf.model.triton_drop_path import scale_samples


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 24), (2, 7, 9), (1, 300, 48)], ids=str)
@pytest.mark.parametrize("adds", [False, True])
def test_branches_are_scaled(adds, shape, dtype, device):
    """Also where a sample has a rest of a tile."""
    branch = torch.randn(shape, device=device, dtype=dtype)
    residual = torch.randn(shape, device=device) if adds else None
    factors = torch.tensor([[3.0] * 3, [0.0, 1.25, 2.0]], device=device)[:, -len(branch) :].contiguous()
    expected = branch.float() * factors[-1].view(-1, 1, 1) + (residual if adds else 0.0)
    y = scale_samples(branch, factors, residual)
    assert y.dtype == (torch.float32 if adds else dtype)
    torch.testing.assert_close(y, expected.to(y.dtype))  # a GPU rounds the product and the sum at once
    half = scale_samples(branch, factors, residual, dtype=torch.float16)
    torch.testing.assert_close(half, expected.half())
