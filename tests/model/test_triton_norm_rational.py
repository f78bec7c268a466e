"""Residual addition, layer norm and rational in one kernel, by its launchers."""

import pytest
import torch
from helpers import DTYPES, KERNEL_DEVICES, ROWS, assert_no_worse, relative_error

from flashkat_hf.model import triton_norm, triton_norm_rational
from flashkat_hf.model.reference import rational_reference

pytestmark = pytest.mark.parametrize("device", KERNEL_DEVICES)
SHAPES = [
    (3, 7, 24),
    (5, 40),
    (3, 9, 192),
    (4, 384),
    (0, 64),
    (8,),
]  # odd widths and numbers, padded rows, no rows
EPS = 1e-6


def random_arguments(shape, dtype, device, rows=(1, 8)):
    """Return summands, the norm's parameters, tables, and gradients of both results."""
    residual, branch, grad_total, grad_y = torch.randn(4, *shape, device=device).to(dtype)
    weight, bias = torch.randn(2, shape[-1], device=device)
    tables = torch.randn(rows[0], 6, device=device), torch.randn(rows[1], 4, device=device)
    return residual, branch, weight, bias, *tables, grad_total, grad_y


def plain(total, parameters, grad_total, grad_y, dtype):
    """Return y and the gradients of total and of the parameters, by plain PyTorch in `dtype`."""
    total, *parameters = (tensor.detach().to(dtype).requires_grad_() for tensor in (total, *parameters))
    weight, bias, *tables = parameters
    y = rational_reference(torch.nn.functional.layer_norm(total, weight.shape, weight, bias, EPS), *tables)
    leaves, grads = (total, *parameters), (grad_total.to(dtype), grad_y.to(dtype))
    return [y.detach(), *torch.autograd.grad((total * 1, y), leaves, grads)]


def check(residual, branch, *parameters_and_gradients):
    """Check value and gradients, and return the arguments of the backward pass."""
    *parameters, grad_total, grad_y = parameters_and_gradients
    total, y, mean, rstd = triton_norm_rational.add_norm_rational_forward(residual, branch, *parameters, EPS)
    arguments = grad_total, grad_y, total, mean, rstd, *parameters
    grad, columns, *grad_tables = triton_norm_rational.add_norm_rational_backward(*arguments, totals=False)
    grads = grad, *columns, *grad_tables
    assert_no_worse(total, residual + branch, residual.double() + branch.double())
    baseline = plain(total, parameters, grad_total, grad_y, torch.float32)
    exact = plain(total, parameters, grad_total, grad_y, torch.float64)
    for actual, once, true in zip((y, grads[0]), baseline[:2], exact[:2], strict=True):
        assert_no_worse(actual, once.to(actual.dtype), true)
    for actual, true in zip(grads[1:], exact[2:], strict=True):
        assert actual.shape == true.shape
        if total.numel():
            assert relative_error(actual, true) <= 2e-5  # asked of float32 sums
    return arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, rows, dtype, device):
    check(*random_arguments(shape, dtype, device, rows))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_totals(shape, device):
    """The sums of both gradients' columns are right; other results change by the order of sums alone."""
    arguments = check(*random_arguments(shape, torch.float32, device))
    plain = triton_norm_rational.add_norm_rational_backward(*arguments, totals=False)
    grad, columns, *grad_tables = triton_norm_rational.add_norm_rational_backward(*arguments, totals=True)
    assert torch.equal(grad, plain[0])
    true = [
        rows.double().flatten(0, -2).sum(0) if rows.ndim > 1 else rows.double()
        for rows in (grad, arguments[0])
    ]
    for actual, expected in zip((*columns, *grad_tables), (*plain[1], *true, *plain[2:]), strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_alone(shape, dtype, device):
    """The branch may be float16 beside a residual stream of `dtype`."""
    x, _, weight, bias, *_, grad_total, grad_y = random_arguments(shape, dtype, device)
    y, mean, rstd = triton_norm.norm_forward(x, weight, bias, EPS, torch.float16)
    results = y, *triton_norm.norm_backward(grad_total, grad_y, x, mean, rstd, weight, bias)

    def by_autograd(arithmetic):
        leaves = [tensor.to(arithmetic).requires_grad_() for tensor in (x, weight, bias)]
        normal = torch.nn.functional.layer_norm(leaves[0], weight.shape, *leaves[1:], EPS)
        grads = grad_total.to(arithmetic), grad_y.to(arithmetic)
        return normal.detach(), *torch.autograd.grad((leaves[0] * 1, normal), leaves, grads)

    baseline, exact = by_autograd(torch.float32), by_autograd(torch.float64)
    for actual, once, true in zip(results[:2], baseline[:2], exact[:2], strict=True):
        assert_no_worse(actual, once.to(actual.dtype), true)
    for actual, true in zip(results[2:], exact[2:], strict=True):
        assert actual.shape == true.shape
        if x.numel():
            assert relative_error(actual, true) <= 2e-5  # asked of float32 sums


@pytest.mark.parametrize("num_multiprocessors", [1, 3])
def test_any_number_of_programs(num_multiprocessors, device, monkeypatch):
    monkeypatch.setattr(triton_norm, "num_multiprocessors", lambda device: num_multiprocessors)
    check(*random_arguments((70, 48), torch.float32, device))


def test_a_branch_of_another_dtype(device):
    residual, branch, *rest = random_arguments((6, 48), torch.float32, device)
    branch = branch.to(torch.float16)
    total, y, *_ = triton_norm_rational.add_norm_rational_forward(residual, branch, *rest[:4], EPS)
    assert (total.dtype, y.dtype) == (torch.float32, torch.float16)
    assert torch.equal(total, residual + branch)
