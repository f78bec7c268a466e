"""The operator `packed_attention`.

Self-attention of short sequences from the product that holds q, k and v.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from .operators import HALF, by_device, by_formula, differentiable
from .reference import packed_attention_gradients, packed_attention_value

try:
    from .triton_attention import packed_attention_backward, packed_attention_forward
except ImportError:  # no triton: the plain path serves every device
    packed_attention_forward = packed_attention_backward = None

MAX_BATCH = 65_535  # CUDA's limit of a grid's third axis
MAX_TOKENS = 1088  # beyond, PyTorch's forward pass is as fast: benchmarks/results/attention.jsonl
HEAD_DIMS = (16, 32, 64)


def packed_attention(qkv: Tensor, num_heads: int, scale: float, qkv_bias: Tensor | None = None) -> Tensor:
    """Compute self-attention of short sequences.

    Args:
        qkv: `(batch, num_tokens, 3 * hidden_size)`, bfloat16 or float16; queries, keys and values, each head
            by head; at most `MAX_TOKENS` tokens, and heads of 16, 32 or 64 channels.
        num_heads: heads.
        scale: factor of the scores, positive.
        qkv_bias: `(3 * hidden_size,)`, any dtype; qkv already contains it, by an addition that did not record
            its gradient, which is made here.

    Returns:
        `(batch, num_tokens, hidden_size)`.

    Raises:
        ValueError: another shape, dtype or scale.
    """
    if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads) or qkv.shape[2] // (3 * num_heads) not in HEAD_DIMS:
        raise ValueError(
            f"qkv must be (batch, tokens, 3 * {num_heads} heads of {HEAD_DIMS}), not {tuple(qkv.shape)}"
        )
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}")
    if qkv.shape[0] > MAX_BATCH:
        raise ValueError(f"qkv has {qkv.shape[0]} samples; the attention kernels take {MAX_BATCH} at most")
    if qkv.shape[1] > MAX_TOKENS or qkv.dtype not in HALF:
        raise ValueError(
            f"qkv must be half precision and of at most {MAX_TOKENS} tokens, not {qkv.shape[1]} {qkv.dtype}"
        )
    (y,) = packed_attention_operator(qkv.contiguous(), qkv_bias, num_heads, scale)
    return y


def _forward(qkv: Tensor, qkv_bias: Tensor | None, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    return _value(qkv, num_heads, scale)


def _shapes_of_y_and_lse(qkv, qkv_bias, num_heads, scale):
    batch, num_tokens, width = qkv.shape
    y = qkv.new_empty(batch, num_tokens, width // 3)
    return y, qkv.new_empty(batch, num_heads, num_tokens, dtype=torch.float32)


def _shapes_of_gradients(grad_y, qkv, y, lse, scale):
    return torch.empty_like(qkv), qkv.new_empty(qkv.shape[-1], dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    qkv, qkv_bias, _, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.bias_dtype = None if qkv_bias is None else qkv_bias.dtype
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, backward, grad_y: Tensor, *_) -> tuple:
    grad_qkv, columns = backward(grad_y.contiguous(), *ctx.saved_tensors, ctx.scale)
    return grad_qkv, None if ctx.bias_dtype is None else columns.to(ctx.bias_dtype), None, None


def _formula_gradients(ctx, grad_y: Tensor) -> tuple:
    qkv, _, lse = ctx.saved_tensors
    (grad_qkv,) = by_formula(
        lambda qkv: packed_attention_value(qkv, lse.shape[1], ctx.scale)[0], (qkv,), grad_y
    )
    columns = None if ctx.bias_dtype is None else grad_qkv.sum((0, 1)).to(ctx.bias_dtype)
    return grad_qkv, columns, None, None


def _flops(qkv, qkv_bias, num_heads: int, scale: float, **_) -> int:
    shape = qkv[0], num_heads, qkv[1], qkv[2] // (3 * num_heads)
    return sdpa_flop_count(shape, shape, shape)


def _backward_flops(grad_y, qkv, y, lse, scale: float, **_) -> int:
    shape = qkv[0], lse[1], qkv[1], qkv[2] // (3 * lse[1])
    return sdpa_backward_flop_count(shape, shape, shape, shape)


_value = by_device(packed_attention_value, packed_attention_forward)
packed_attention_operator = differentiable(
    "packed_attention",
    (_forward, _shapes_of_y_and_lse),
    (by_device(packed_attention_gradients, packed_attention_backward), _shapes_of_gradients),
    _save,
    _gradients,
    _formula_gradients,
    num_outputs=1,
    flops=(_flops, _backward_flops),
)
