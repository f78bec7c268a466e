"""The operator `block`: a whole KAT block in eager mode, one node for autograd.

It has no formula of its own: where something traces or transforms, and where a module is touched,
`fusing.py` puts the block together from smaller operators.
"""

from typing import Any

import torch
from torch import Tensor

from .op_attention import HEAD_DIMS, MAX_BATCH, MAX_TOKENS
from .operators import HALF, NO_SECOND_DERIVATIVES, decomposes, has_kernel, is_traced, needs_formula

try:
    from .triton_block import Block, Parameters, Saved, block_backward, block_forward
except ImportError:  # no triton: blocks are put together from modules
    Block = Parameters = Saved = block_backward = block_forward = None

QKV_BIAS = 3  # its place in `Parameters`


def block_serves(x: Tensor, parameters: list[Tensor | None], head_dim: int, dtype: torch.dtype) -> bool:
    """Tell whether `block` takes a residual stream and a block's parameters, in the order of `Parameters`.

    Args:
        x: of any shape and dtype.
        parameters: as its modules have them.
        head_dim: channels of a head.
        dtype: of the matrix products.
    """
    if block_forward is None or is_traced(x) or decomposes(x) or not has_kernel(x) or dtype not in HALF:
        return False
    if x.ndim != 3 or x.numel() == 0 or x.shape[0] > MAX_BATCH or x.shape[1] > MAX_TOKENS:
        return False
    if not x.is_contiguous() or head_dim not in HEAD_DIMS:
        return False
    device = x.get_device()
    for i, parameter in enumerate(parameters):
        if parameter is None:
            if i != QKV_BIAS:  # which alone may be missing
                return False
        elif (
            not parameter.is_contiguous()
            or parameter.get_device() != device
            or parameter.dtype == torch.float64
        ):
            return False
    return True


def block(
    x: Tensor,
    heads: tuple[int, float],
    eps: tuple[float, float],
    dtype: torch.dtype,
    *parameters: Tensor | None,
) -> Tensor:
    """Compute `total = x + proj(attention(norm1(x)))`, then `total + fc2(act2(fc1(act1(norm2(total)))))`.

    Args:
        x: `(batch, num_tokens, hidden_size)`, contiguous; what `block_serves` takes.
        heads: number of heads, and factor of the scores.
        eps: added to the variances of norm1 and norm2.
        dtype: of the matrix products; float32 arithmetic elsewhere.
        parameters: in the order of `Parameters`.

    Returns:
        `(batch, num_tokens, hidden_size)`, in the dtype of the sum of x and a product.
    """
    return _Block.apply(x, Block(*heads, *eps, dtype), *parameters)  # pyright: ignore


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, block, *parameters):
        y, saved = block_forward(x, Parameters(*parameters), block, any(ctx.needs_input_grad))  # pyright: ignore
        if saved is not None:
            ctx.save_for_backward(*saved)
            ctx.block = block
            ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in parameters]
        return y

    @staticmethod
    def backward(ctx: Any, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        if needs_formula(grad):
            raise RuntimeError(NO_SECOND_DERIVATIVES)
        saved = Saved(*ctx.saved_tensors)  # pyright: ignore
        wanted = ctx.needs_input_grad[2:]
        grad_x, grads = block_backward(grad.contiguous(), saved, ctx.block, ctx.dtypes, wanted)  # pyright: ignore
        return grad_x, None, *grads
