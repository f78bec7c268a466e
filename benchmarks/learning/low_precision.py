"""Coefficients in bfloat16, and gradients of coefficients that are added in bfloat16 in a random order.

The FlashKAT paper's kernel sums the terms of a gradient inside a block of rows, in float32, and adds each
block's sum to the coefficient's gradient in memory by an atomic addition; the order of these is that in which
the blocks happen to end. `sum_atomically` does the same with the memory in bfloat16: sums of blocks in
float32, rounded, then added one after the other in bfloat16, in an order drawn anew for each pass.
"""

import torch
from torch import Tensor, nn

from flashkat_hf import rational
from flashkat_hf.model.layers import GroupRational

ROWS = 64  # of a block, as in the paper's algorithm 2 (benchmarks/paper/triton_algorithms.py)


def round_tables(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the coefficients of a model's rationals in a dtype."""
    for module in model.modules():
        if isinstance(module, GroupRational):
            module.to(dtype)


def sum_atomically(model: nn.Module) -> None:
    """Replace a model's rationals by such whose coefficients' gradients are added in bfloat16."""
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, GroupRational):
                setattr(parent, name, AtomicRational(module))


class AtomicRational(nn.Module):
    """A group rational with the same value and gradient of x, and atomic sums in bfloat16."""

    def __init__(self, module: GroupRational):
        super().__init__()
        self.hidden_size = module.hidden_size
        self.numerator, self.denominator = module.numerator, module.denominator

    def forward(self, x: Tensor) -> Tensor:
        return _Atomic.apply(x, self.numerator, self.denominator)  # pyright: ignore[reportReturnType]


class _Atomic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, numerator, denominator):
        ctx.save_for_backward(x, numerator, denominator)
        return rational(x, numerator, denominator)

    @staticmethod
    def backward(ctx, grad_y):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, numerator, denominator = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = rational(leaf, numerator.detach(), denominator.detach())
            (grad_x,) = torch.autograd.grad(y, leaf, grad_y)
        terms = block_sums(x, grad_y, numerator, denominator)
        total = added_one_by_one(terms)
        grad_numerator, grad_denominator = total.split([6, 4], dim=-1)
        if len(numerator) == 1:
            grad_numerator = grad_numerator.sum(0, keepdim=True)
        return grad_x, grad_numerator.to(numerator.dtype), grad_denominator.to(denominator.dtype)


def block_sums(x: Tensor, grad_y: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return each block's sums of the ten gradients' terms, `(blocks, num_groups, 10)` float32.

    Args:
        x: `(..., hidden_size)`.
        grad_y: of the same shape.
        numerator: `(1 or num_groups, 6)`.
        denominator: `(num_groups, 4)`.
    """
    num_groups = len(denominator)
    a, b = numerator.float().expand(num_groups, 6), denominator.float()
    x, grad_y = (_blocks(each, num_groups) for each in (x, grad_y))
    absolute = x.abs()
    columns = (slice(None), None)  # (num_groups, 1) beside (blocks, ROWS, num_groups, channels)
    p, q, power = torch.zeros_like(x), torch.ones_like(x), torch.ones_like(x)
    for k in range(6):
        p = p + a[:, k][columns] * power
        power = power * x
    power = absolute
    for k in range(4):
        q = q + b[:, k].abs()[columns] * power
        power = power * absolute
    term = grad_y / q
    sums = [(term * x**k).sum((1, 3)) for k in range(6)]
    term = -term * p / q
    signs = torch.where(b < 0, -1.0, 1.0)
    sums += [(term * absolute ** (k + 1)).sum((1, 3)) * signs[:, k] for k in range(4)]
    return torch.stack(sums, dim=-1)


def _blocks(x: Tensor, num_groups: int) -> Tensor:
    """Return `(blocks, ROWS, num_groups, channels)` float32, with rows of zeros at the end."""
    rows = x.detach().float().reshape(-1, num_groups, x.shape[-1] // num_groups)
    missing = -len(rows) % ROWS
    return nn.functional.pad(rows, (0, 0, 0, 0, 0, missing)).unflatten(0, (-1, ROWS))


def added_one_by_one(terms: Tensor) -> Tensor:
    """Return the sum over the first dimension in bfloat16, rounded after each addition, in a random order."""
    order = torch.rand(len(terms), device=terms.device).argsort()
    total = torch.zeros_like(terms[0], dtype=torch.bfloat16)
    for term in terms.to(torch.bfloat16)[order]:
        total = total + term
    return total
