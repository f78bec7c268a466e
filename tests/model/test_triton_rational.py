"""The Triton kernels by their launchers: on CPU tensors under TRITON_INTERPRET=1, on a GPU otherwise."""

import pytest
import torch
from helpers import (
    CASES,
    DTYPES,
    KERNEL_DEVICES,
    ROWS,
    SHAPES,
    assert_value_and_gradients,
    random_inputs,
    reference_case,
    relative_error,
)

from flashkat_hf.model import triton_rational

pytestmark = pytest.mark.parametrize("device", KERNEL_DEVICES)


def launch(x, numerator, denominator, grad_y):
    y = triton_rational.rational_forward(x, numerator, denominator)
    return [y, *triton_rational.rational_backward(grad_y, x, numerator, denominator)]


@pytest.mark.parametrize("case", CASES)
def test_stored_numbers(case, device):
    stored = reference_case(case)
    inputs = (stored[name].to(device) for name in ("x", "numerator", "denominator", "grad_output"))
    for actual, name in zip(launch(*inputs), ("y", "dx", "d_numerator", "d_denominator"), strict=True):
        assert relative_error(actual, stored[name]) <= 2e-5, name  # asked of float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, rows, dtype, device):
    inputs = random_inputs(shape, dtype, device, rows)
    assert_value_and_gradients(launch(*inputs), *inputs)


@pytest.mark.parametrize("num_multiprocessors", [1, 3])
def test_any_number_of_programs_gives_the_gradients(num_multiprocessors, device, monkeypatch):
    """Programs walk over many tiles, in steps of whole rows although a row is no multiple of a tile."""
    monkeypatch.setattr(triton_rational, "num_multiprocessors", lambda device: num_multiprocessors)
    inputs = random_inputs((150, 120), torch.float32, device)  # 5 x 3 channels a group: a width of 1
    assert_value_and_gradients(launch(*inputs), *inputs)


def test_nan_stays_where_it_is(device):
    x, numerator, denominator, _ = random_inputs((3, 24), torch.float32, device)
    x[1, 5] = torch.nan
    y = triton_rational.rational_forward(x, numerator, denominator)
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.gpu
def test_another_batch_or_width_does_not_recompile(device):
    kernels = triton_rational.rational_forward_kernel, triton_rational.rational_backward_kernel

    def compiled():
        return [len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()]

    launch(*random_inputs((2, 192), torch.bfloat16, device))
    before = compiled()
    for shape in ((1, 64), (16, 192), (17, 384), (33, 768), (7, 3, 3072)):
        launch(*random_inputs(shape, torch.bfloat16, device))
    assert compiled() == before


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_sums_of_long_rows_are_added_up_before_the_second_stage(rows, device, monkeypatch):
    """Images with the channels first have such rows: one image's channels and pixels are one row."""
    monkeypatch.setattr(triton_rational, "MOST_SEGMENTS", 1)
    inputs = random_inputs((40, 192), torch.float32, device, rows)
    assert_value_and_gradients(launch(*inputs), *inputs)
