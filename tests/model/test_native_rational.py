"""The rational in C on a CPU: exact as the formula, the same for any threads, and dispensable."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROWS, assert_no_worse, exact_value_and_gradients, random_inputs

from flashkat_hf.model import native_rational
from flashkat_hf.model.op_rational import rational
from flashkat_hf.model.reference import rational_gradients, rational_value

SHAPES = [(2, 197, 192), (1, 40), (3, 7, 24), (35, 8), (17, 3 * 8 * 5), (0, 64), (2, 8 * 5001)]
# groups of 24, 5, 3, 1, 15, and as long as those of images, channels first
needs_compiler = pytest.mark.skipif(native_rational.load() is None, reason="no compiler, or no OpenMP here")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Let C serve tensors of any size; return a list of the sizes that it was asked for and served."""
    sizes: list = []
    library = native_rational.library
    monkeypatch.setattr(native_rational, "MIN_ELEMENTS", 0)

    def noted(x):
        functions = library(x)
        sizes.extend([x.numel()] * (functions is not None))
        return functions

    monkeypatch.setattr(native_rational, "library", noted)
    return sizes


def by_operator(x, numerator, denominator, grad_y, function=rational):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, numerator, denominator)]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad_y)]


@needs_compiler
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, rows, calls):
    inputs = random_inputs(shape, torch.float32, "cpu", rows)
    x, numerator, denominator, grad_y = inputs
    results = by_operator(*inputs)
    assert len(calls) == 2  # forward and backward
    tables = numerator, denominator
    baseline = rational_value(x, *tables), *rational_gradients(grad_y, x, *tables)
    for actual, plain, exact in zip(results, baseline, exact_value_and_gradients(*inputs), strict=True):
        assert_no_worse(actual, plain, exact)


@needs_compiler
def test_zeros_of_both_signs_and_what_is_no_number(calls):
    """The slope of |x| and |b| at 0 is +1; infinities and NaN stay where they are."""
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 0.5])
    tables = torch.randn(1, 6), torch.tensor([[0.0, -0.0, 0.3, -0.2]])
    grad_y = torch.ones_like(x)
    (y, grad_x, *_), expected = by_operator(x, *tables, grad_y), rational_value(x, *tables)
    torch.testing.assert_close(y, expected, equal_nan=True)
    torch.testing.assert_close(grad_x, rational_gradients(grad_y, x, *tables)[0], equal_nan=True)
    finite = torch.tensor([0.0, -0.0, 1.0, -1.0])
    for actual, plain in zip(
        by_operator(finite, *tables, torch.ones(4))[1:],
        rational_gradients(torch.ones(4), finite, *tables),
        strict=True,
    ):
        torch.testing.assert_close(actual, plain)
    assert len(calls) == 4


@needs_compiler
def test_threads_change_no_bit():
    x, *tables, grad_y = random_inputs((3, 197, 192), torch.float32, "cpu")
    results, num_threads = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(by_operator(x, *tables, grad_y))
    finally:
        torch.set_num_threads(num_threads)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


class Rational(torch.nn.Module):
    def forward(self, x, numerator, denominator):
        return rational(x, numerator, denominator)


@needs_compiler
def test_what_it_does_not_serve(calls):
    """Other dtypes, and tensors at which something looks, go by PyTorch's operations."""
    x, *tables, _ = random_inputs((4, 24), torch.float32, "cpu")
    for dtype in (torch.float64, torch.bfloat16):
        rational(x.to(dtype), *tables)
    torch.func.jvp(lambda x: rational(x, *tables), (x,), (x,))
    torch.func.vmap(lambda x: rational(x, *tables))(x)
    exported = torch.export.export(Rational(), (x, *tables)).module()(x, *tables)
    assert calls == []
    assert torch.allclose(exported, rational(x, *tables))


@needs_compiler
def test_compiled_for_a_cpu(calls):
    """`torch.compile` calls the same C in both directions; half precision goes by the formula."""
    inputs = random_inputs((3, 197, 192), torch.float32, "cpu")
    compiled = torch.compile(rational, fullgraph=True)
    expected, actual = by_operator(*inputs), by_operator(*inputs, compiled)
    assert len(calls) == 4
    assert all(map(torch.equal, actual, expected))
    half, *tables = (tensor.bfloat16() for tensor in inputs[:3])
    torch.testing.assert_close(compiled(half, *tables), rational(half, *tables))
    assert len(calls) == 4


def test_small_tensors_start_no_compiler(monkeypatch):
    """Nothing is loaded for tests and toys, and the size alone decides: two runs agree bit for bit."""
    monkeypatch.setattr(native_rational, "load", pytest.fail)
    x, *tables, _ = random_inputs((8, 17, 64), torch.float32, "cpu")
    rational(x, *tables)


@pytest.mark.parametrize("fault", ["no compiler", "it fails", "it hangs", "it makes rubbish"])
def test_without_a_compiler_the_formula_serves(fault, tmp_path, monkeypatch):
    compiler = tmp_path / "bin/gcc"
    compiler.parent.mkdir()
    scripts = {
        "it fails": "exit 1",
        "it hangs": "exec sleep 60",
        "it makes rubbish": 'for last; do :; done; echo > "$last"',
    }
    if fault in scripts:
        compiler.write_text(f"#!/bin/sh\n{scripts[fault]}\n")
        compiler.chmod(0o755)
    monkeypatch.setenv(
        "PATH", f"{compiler.parent}:/usr/bin:/bin" if fault in scripts else str(compiler.parent)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_rational, "TIME_LIMIT", 0.2)
    native_rational.load.cache_clear()
    try:
        inputs = random_inputs((2, 197, 192), torch.float32, "cpu")
        x, *tables, grad_y = inputs
        expected = rational_value(x, *tables), *rational_gradients(grad_y, x, *tables)
        assert native_rational.load() is None
        assert all(map(torch.equal, by_operator(*inputs), expected))
    finally:
        native_rational.load.cache_clear()


@needs_compiler
@pytest.mark.parametrize("mode", [0o700, 0o777])
def test_the_cache_is_used_if_nobody_else_may_write_there(mode, tmp_path, monkeypatch):
    folder = tmp_path / "flashkat_hf"
    folder.mkdir()
    folder.chmod(mode)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled: list = []
    compile_it = native_rational._compile
    monkeypatch.setattr(native_rational, "_compile", lambda *a: (compiled.append(a), compile_it(*a)))
    try:
        for _ in range(2):
            native_rational.load.cache_clear()
            assert native_rational.load() is not None
    finally:
        native_rational.load.cache_clear()
    assert len(compiled) == (1 if mode == 0o700 else 2)
    assert len(list(folder.iterdir())) == (1 if mode == 0o700 else 0)


@needs_compiler
def test_importing_compiles_nothing_and_a_forward_soon_returns(tmp_path):
    """A newcomer's first forward waits for one short call of the compiler, and importing for none."""
    program = """
import time, torch
from pathlib import Path
from flashkat_hf.model.op_rational import rational
assert not Path(CACHE).exists()
x, start = torch.randn(8, 197, 192), time.perf_counter()
rational(x, torch.randn(1, 6), torch.randn(8, 4))
print(time.perf_counter() - start)
assert len(list(Path(CACHE).iterdir())) == 1
""".replace("CACHE", repr(str(tmp_path / "flashkat_hf")))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 10  # a quarter of a second on a machine of its own
