"""The plain PyTorch formula against the original code's numbers in float64, and against autograd."""

import pytest
import torch
from helpers import CASES, reference_case, relative_error, value_and_gradients

from flashkat_hf.model import reference
from flashkat_hf.model.reference import rational_decomposed, rational_reference

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}  # asked of every implementation


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("function", [rational_reference, rational_decomposed])
@pytest.mark.parametrize("case", CASES)
def test_stored_numbers(case, function, dtype):
    stored = reference_case(case)
    inputs = (stored[name].to(dtype) for name in ("x", "numerator", "denominator", "grad_output"))
    results = value_and_gradients(function, *inputs)
    for actual, name in zip(results, ("y", "dx", "d_numerator", "d_denominator"), strict=True):
        assert relative_error(actual, stored[name]) <= TOLERANCES[dtype], name


def test_is_not_the_function_of_the_original_cpu_path():
    stored = reference_case("b2l5d48_g8_num1")
    y = rational_reference(stored["x"], stored["numerator"], stored["denominator"])
    assert relative_error(y, stored["y_signed_denominator_bug"]) > 0.01


def test_closed_form_gradients_by_finite_differences():
    x = torch.randn(3, 4, 16, dtype=torch.float64)
    x += 0.1 * x.sign()  # away from the kink of |x| at 0
    tables = torch.randn(1, 6, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, *tables)]
    assert torch.autograd.gradcheck(rational_reference, inputs)


def test_zeros_in_the_denominator_learn():
    """The identity starts with b = 0; `torch.abs` would give it no gradient."""
    x, numerator, denominator = torch.randn(5, 16), torch.tensor([[0.0, 1, 0, 0, 0, 0]]), torch.zeros(8, 4)
    for function in (rational_reference, rational_decomposed):
        *_, grad_denominator = value_and_gradients(function, x, numerator, denominator, torch.ones_like(x))
        assert grad_denominator.count_nonzero() == denominator.numel()


def test_blocks_of_rows_do_not_show(monkeypatch):
    inputs = torch.randn(50, 7, 24), torch.randn(1, 6), torch.randn(8, 4), torch.randn(50, 7, 24)
    whole = value_and_gradients(rational_reference, *inputs)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 100)  # four rows a block, the last one short
    blocks = value_and_gradients(rational_reference, *inputs)
    assert torch.equal(blocks[0], whole[0])
    assert torch.equal(blocks[1], whole[1])
    for actual, expected in zip(blocks[2:], whole[2:], strict=True):
        torch.testing.assert_close(actual, expected)  # sums in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(dtype):
    """Forward and backward need at most four times x beyond the inputs, and keep only x and the tables."""
    x = torch.randn(1024, 1024).to(dtype).requires_grad_()
    numerator, denominator = torch.randn(1, 6, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    grad_y = torch.ones_like(x)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = rational_reference(x, numerator, denominator)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), numerator.data_ptr(), denominator.data_ptr()}
    assert peak_bytes(lambda: rational_reference(x, numerator, denominator)) <= 4 * x.nbytes
    assert peak_bytes(lambda: torch.autograd.grad(y, (x, numerator, denominator), grad_y)) <= 4 * x.nbytes


def peak_bytes(function) -> int:
    """Return the most bytes of tensors alive at once in `function`, by the profiler's allocations."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    assert peak > 0
    return peak
