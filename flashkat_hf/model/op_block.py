"""The operators `block`, a whole KAT block in eager mode, and `block_tail`, what stands behind its attention.

One node for autograd each, and no formula of their own: where something traces or transforms, and where a
module is touched, `fusing.py` puts the block together from smaller operators.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .operators import NO_SECOND_DERIVATIVES, decomposes, has_kernel, is_traced, needs_formula

try:
    from .triton_block import Block, Head, Parameters, Tail, block_backward, block_forward
except ImportError:  # no triton: blocks are put together from modules
    Block = Head = Parameters = Tail = block_backward = block_forward = None

NUM_HEAD, NUM_HEAD_PARAMETERS = 10, 4  # fields of `Head`, and those of `Parameters` that belong to it


def tail_serves(x: Tensor, parameters: Sequence[Tensor | None]) -> bool:
    """Tell whether `block_tail` takes a residual stream and a block's parameters from proj on."""
    if block_forward is None or is_traced(x) or decomposes(x) or not has_kernel(x):
        return False
    return x.ndim == 3 and x.numel() > 0 and x.is_contiguous() and _takes(parameters, x.get_device())


def block_serves(x: Tensor, parameters: Sequence[Tensor | None]) -> bool:
    """Tell whether `block` takes what `tail_serves` allows with norm1's and qkv's parameters before it.

    Qkv's bias, the last one, may be missing.
    """
    *others, bias = parameters
    return _takes(others if bias is None else parameters, x.get_device())


def _takes(parameters: Sequence[Tensor | None], device: int) -> bool:
    for parameter in parameters:
        if (
            parameter is None
            or not parameter.is_contiguous()
            or parameter.get_device() != device
            or parameter.dtype == torch.float64
        ):
            return False
    return True


def block(
    x: Tensor,
    heads: tuple[int, float, bool],
    eps: tuple[float, float],
    dtype: torch.dtype,
    factors: Tensor | None,
    parameters: Sequence[Tensor | None],
) -> Tensor:
    """Compute `total = x + proj(attention(norm1(x)))`, then `total + fc2(act2(fc1(act1(norm2(total)))))`.

    Args:
        x: `(batch, num_tokens, hidden_size)`; what `block_serves` takes.
        heads: number of heads, factor of the scores, and whether our attention kernel takes x.
        eps: added to the variances of norm1 and norm2.
        dtype: of the matrix products, half precision; float32 arithmetic elsewhere.
        factors: `(2, batch)` float32: by what the two branches of each sample are multiplied before they are
            added, as stochastic depth does; None: they are added as they are.
        parameters: in the order of `Parameters`.

    Returns:
        `(batch, num_tokens, hidden_size)`, in the dtype of the sum of x and a product.
    """
    settings = Block(*heads, *eps, dtype, factors)  # pyright: ignore[reportOptionalCall]
    return _apply(x, None, settings, parameters)


def block_tail(
    x: Tensor, mixed: Tensor, eps: float, factors: Tensor | None, parameters: Sequence[Tensor | None]
) -> Tensor:
    """Compute `total = x + proj(mixed)`, then `total + fc2(act2(fc1(act1(norm2(total)))))`.

    Args:
        x: `(batch, num_tokens, hidden_size)`; what `tail_serves` takes.
        mixed: like x, what the heads made of it; products are in its dtype.
        eps: added to norm2's variance.
        factors: as for `block`.
        parameters: those of `Parameters` from proj on.

    Returns:
        As `block`.
    """
    settings = Block(0, 0.0, True, 0.0, eps, mixed.dtype, factors)  # pyright: ignore[reportOptionalCall]
    return _apply(x, mixed.contiguous(), settings, (*(None,) * NUM_HEAD_PARAMETERS, *parameters))


def _apply(x: Tensor, mixed: Tensor | None, block: Any, parameters: Sequence[Tensor | None]) -> Tensor:
    """Compute a block; as a node of autograd only where there may be a backward, since a node takes time."""
    if not torch.is_grad_enabled():
        return block_forward(x, mixed, Parameters(*parameters), block, False)[0]  # pyright: ignore
    return _Block.apply(x, mixed, block, *parameters)  # pyright: ignore


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, mixed, block, *parameters):
        keep = any(ctx.needs_input_grad)
        y, head, tail = block_forward(x, mixed, Parameters(*parameters), block, keep)  # pyright: ignore
        if tail is not None:
            ctx.save_for_backward(*(head or (None,) * NUM_HEAD), *tail)
            ctx.block = block
            ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in parameters]
        return y

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        if needs_formula(grad):
            raise RuntimeError(NO_SECOND_DERIVATIVES)
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[3:]
        head = None if saved[0] is None else Head(*saved[:NUM_HEAD])  # pyright: ignore
        tail = Tail(*saved[NUM_HEAD:])  # pyright: ignore
        grad_x, grad_mixed, grads = block_backward(  # pyright: ignore
            grad.contiguous(), head, tail, ctx.block, ctx.dtypes, wanted
        )
        return grad_x, grad_mixed, None, *grads
