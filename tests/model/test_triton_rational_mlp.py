"""The kernels of two linear maps with a rational between them, by their launchers."""

import pytest
import torch
from helpers import (
    DTYPES,
    INTERPRETED,
    KERNEL_DEVICES,
    ROWS,
    SHAPES,
    assert_value_and_gradients,
    exact_value_and_gradients,
    random_inputs,
    relative_error,
)

from flashkat_hf.model import triton_rational
from flashkat_hf.model.reference import rational_value
from flashkat_hf.model.triton_rational_mlp import rational_mlp_backward, rational_mlp_forward

pytestmark = pytest.mark.parametrize("device", KERNEL_DEVICES)
HALF = (
    [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
)  # the interpreter cannot multiply bfloat16
MAPS = [((2, 197), 192, 768, 8), ((130,), 64, 256, 8), ((3, 1), 128, 128, 1), ((0, 5), 64, 256, 2)]


def check(x, numerator, denominator, grad_y):
    grad_x, y, columns, *tables = rational_mlp_backward(grad_y, x, numerator, denominator)
    inputs = x, numerator, denominator, grad_y
    assert_value_and_gradients((y, grad_x, *tables), *inputs)
    assert columns.shape == x.shape[-1:]
    if x.numel():
        exact = exact_value_and_gradients(*inputs)[1].reshape(-1, x.shape[-1]).sum(0)
        assert relative_error(columns, exact) <= 2e-5  # asked of float32 sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_gradients_and_column_sums(shape, rows, dtype, device):
    check(*random_inputs(shape, dtype, device, rows))


@pytest.mark.parametrize("num_multiprocessors", [1, 3])
def test_any_number_of_programs(num_multiprocessors, device, monkeypatch):
    monkeypatch.setattr(triton_rational, "num_multiprocessors", lambda device: num_multiprocessors)
    check(*random_inputs((150, 120), torch.float32, device))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("numerators", "keep"), [(1, True), (8, False)])
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_map_and_value(shape, numerators, keep, dtype, device):
    rows, in_features, out_features, groups = shape
    x = torch.randn(*rows, in_features, device=device).to(dtype)
    weight = (torch.randn(out_features, in_features, device=device) * in_features**-0.5).to(dtype)
    bias = torch.randn(out_features, device=device)
    numerator = torch.randn(min(numerators, groups), 6, device=device)
    denominator = torch.randn(groups, 4, device=device)
    y, product = rational_mlp_forward(x, weight, bias, numerator, denominator, keep)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    eps = torch.finfo(dtype).eps
    assert y.shape == exact.shape
    assert y.dtype == product.dtype == dtype
    assert product.shape == (exact.shape if keep else (0,))
    if keep:
        assert ((product - exact).abs() <= eps * exact.abs() + 1e-5).all()  # rounded once, float32 sums
        exact = product.double()  # y is the rational of what backward will see
    true = rational_value(exact, numerator.double(), denominator.double())
    assert (y - true).norm() <= (1 if keep else 4) * eps * true.norm()
