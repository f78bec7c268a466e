"""The backward kernel of a rational between two linear maps, by its launcher."""

import pytest
import torch
from helpers import (
    DTYPES,
    KERNEL_DEVICES,
    ROWS,
    SHAPES,
    assert_no_worse,
    exact_value_and_gradients,
    random_inputs,
    relative_error,
    value_and_gradients,
)

from flashkat_hf import triton_rational
from flashkat_hf.reference import rational_decomposed
from flashkat_hf.triton_rational_linear import rational_linear_backward

pytestmark = pytest.mark.parametrize("device", KERNEL_DEVICES)


def check(x, numerator, denominator, grad_y):
    grad_x, y, columns, *tables = rational_linear_backward(grad_y, x, numerator, denominator)
    inputs = x, numerator, denominator, grad_y
    baseline = value_and_gradients(rational_decomposed, *inputs)
    exact = exact_value_and_gradients(*inputs)
    for actual, plain, true in zip((y, grad_x, *tables), baseline, exact, strict=True):
        assert_no_worse(actual, plain, true)
    assert columns.shape == x.shape[-1:]
    if x.numel():
        assert relative_error(columns, exact[1].reshape(-1, x.shape[-1]).sum(0)) <= 2e-5  # asked of float32 sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_gradients_and_column_sums(shape, rows, dtype, device):
    check(*random_inputs(shape, dtype, device, rows))


@pytest.mark.parametrize("num_multiprocessors", [1, 3])
def test_any_number_of_programs(num_multiprocessors, device, monkeypatch):
    monkeypatch.setattr(triton_rational, "num_multiprocessors", lambda device: num_multiprocessors)
    check(*random_inputs((150, 120), torch.float32, device))
