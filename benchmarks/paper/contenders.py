"""Who is compared: the paper's two algorithms, ours, plain PyTorch eager and compiled, and the originals.

Each is checked against `flashkat_hf.model.reference` before it is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peers
import torch
from bench_model import refuse
from torch import Tensor

from flashkat_hf import START_TABLES
from flashkat_hf.model import reference
from flashkat_hf.model.triton_rational import rational_backward, rational_forward

from . import triton_algorithms

ALGORITHM1, ALGORITHM2, OURS = "algorithm 1", "algorithm 2", "ours"
RELAXED = "algorithm 1, relaxed atomics"
EAGER, COMPILED = "PyTorch eager", "PyTorch compiled"
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # grad_y, x, numerator, denominator


@dataclass(frozen=True)
class Contender:
    """A rational function with its gradients: launchers of kernels, or a function for autograd."""

    name: str
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    repeats: bool = False  # whether both take `repeats`
    slow: bool = False  # whether a backward pass takes about a second

    def forward_call(self, inputs: Inputs, repeats: int = 1) -> Callable[[], Tensor]:
        _, *arguments = inputs
        if self.backward is None:
            return torch.no_grad()(partial(self.forward, *arguments))
        return partial(self.forward, *arguments, **self.options(repeats))

    def backward_call(self, inputs: Inputs, repeats: int = 1) -> Callable[[], tuple[Tensor, ...]]:
        """Return a function that computes the three gradients; the forward pass is done."""
        if self.backward is not None:
            return partial(self.backward, *inputs, **self.options(repeats))
        grad_y, *arguments = inputs
        leaves = [tensor.detach().requires_grad_() for tensor in arguments]
        y = self.forward(*leaves)
        return lambda: torch.autograd.grad(y, leaves, grad_y, retain_graph=True)

    def options(self, repeats: int) -> dict[str, int]:
        return {"repeats": repeats} if self.repeats else {}


def contenders(peer: Path | None, compiled: bool = True) -> dict[str, Contender]:
    """Return the contenders by name; the originals need a folder that holds clones of them."""
    both = (torch.float32, torch.bfloat16)
    decomposed = reference.rational_decomposed
    relaxed = partial(triton_algorithms.algorithm1, order="relaxed")
    known = [
        Contender(
            ALGORITHM1, triton_algorithms.forward, triton_algorithms.algorithm1, repeats=True, slow=True
        ),
        Contender(RELAXED, triton_algorithms.forward, relaxed, repeats=True, slow=True),
        Contender(ALGORITHM2, triton_algorithms.forward, triton_algorithms.algorithm2, repeats=True),
        Contender(OURS, rational_forward, rational_backward, both),
        Contender(EAGER, decomposed, dtypes=both),
    ]
    if compiled:
        known.append(Contender(COMPILED, torch.compile(decomposed, dynamic=False), dtypes=both))
    if peer is not None:
        known += [
            Contender(name, peers.rational(peer, name), slow=name == peers.KAT) for name in peers.SOURCES
        ]
    return {contender.name: contender for contender in known}


def tables(device: str, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return coefficients `(8, 6)` and `(8, 4)` near the swish table, no group like another."""
    rows = (torch.tensor([row] * 8, device=device) for row in START_TABLES["swish"])
    numerator, denominator = (row + noise * torch.randn_like(row) for row in rows)
    return numerator, denominator


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, noise: float = 0.1) -> Inputs:
    grad_y, x = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return grad_y, x, *tables(device, noise)


def exact(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the three gradients in float64, by the reference."""
    cache_sized = reference.BLOCK_ELEMENTS
    reference.BLOCK_ELEMENTS = 2**24 if inputs[0].is_cuda else cache_sized  # a GPU needs larger blocks
    try:
        return reference.rational_gradients(*(tensor.double() for tensor in inputs))
    finally:
        reference.BLOCK_ELEMENTS = cache_sized


def check(contender: Contender, dtype: torch.dtype, device: str, repeats: tuple[int, ...] = (1,)) -> None:
    """Refuse to time a wrong answer: value and gradients on a small input against float64."""
    inputs = draw((3, 7, 192), dtype, device)
    doubles = [tensor.double() for tensor in inputs[1:]]
    expected = [reference.rational_value(*doubles), *exact(inputs)]
    for times in repeats if contender.repeats else (1,):
        results = [
            contender.forward_call(inputs, times)(),
            *contender.backward_call(inputs, times)(),
        ]
        for got, true in zip(results, expected, strict=True):
            # x^5 by powers of numbers up to 5, in float32; one rounding of the result to dtype
            allowed = (1e-4 + 4 * torch.finfo(got.dtype).eps) * true.abs().max()
            error = (got.double() - true).abs().max()
            refuse(
                not error <= allowed,
                f"{contender.name}: error {error:.3g} against the reference, allowed {allowed:.3g}",
            )
