"""Triton kernels of self-attention for short sequences: a program holds all keys and values of one head on chip.

No running softmax, no second pass over the output, no atomics. Queries, keys and values are read from the product that
made them and their gradients are written in its layout: nothing is stacked, and the bias gradient comes along.
"""

import torch
from torch import Tensor

try:  # transformers takes what checkpoint code imports elsewhere for a requirement
    import triton
    import triton.language as tl
except ImportError:
    raise

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=("num_tokens", "num_heads", "scale"))
def packed_attention_forward_kernel(
    qkv_ptr,  # (batch, num_tokens, 3, num_heads, HEAD_DIM), contiguous, bfloat16 or float16
    y_ptr,  # (batch, num_tokens, num_heads, HEAD_DIM), likewise
    lse_ptr,  # (batch, num_heads, num_tokens) float32: log2 of the sum of exponentials
    num_tokens: tl.int32,
    num_heads: tl.int32,
    scale: tl.float32,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Y = softmax(scale q k^T) v, a head a program.

    Grid (batch * num_heads,); KEYS is a power of two, at least num_tokens. Products in the input's dtype with float32
    sums, softmax in float32. Memory: one read of qkv, one write of y.
    """
    head = tl.program_id(0).to(tl.int64)
    batch, head_in_row = head // num_heads, head % num_heads
    width = num_heads * HEAD_DIM
    qkv_ptr += batch * num_tokens * 3 * width + head_in_row * HEAD_DIM
    y_ptr += batch * num_tokens * width + head_in_row * HEAD_DIM
    channel = tl.arange(0, HEAD_DIM)[None, :]
    key = tl.arange(0, KEYS)
    keys = key[:, None] * 3 * width + channel
    is_key = key < num_tokens
    k = tl.load(qkv_ptr + width + keys, mask=is_key[:, None], other=0.0)
    v = tl.load(qkv_ptr + 2 * width + keys, mask=is_key[:, None], other=0.0)
    for first in range(0, num_tokens, QUERIES):
        query = first + tl.arange(0, QUERIES)
        is_query = query < num_tokens
        q = tl.load(qkv_ptr + query[:, None] * 3 * width + channel, mask=is_query[:, None], other=0.0)
        score = tl.where(is_key[None, :], tl.dot(q, tl.trans(k)) * (scale * LOG2_E), float("-inf"))
        largest = tl.max(score, 1)
        p = tl.exp2(score - largest[:, None])
        total = tl.sum(p, 1)
        y = tl.dot(p.to(v.dtype), v) / total[:, None]
        tl.store(y_ptr + query[:, None] * width + channel, y.to(y_ptr.dtype.element_ty), mask=is_query[:, None])
        tl.store(lse_ptr + head * num_tokens + query, largest + tl.log2(total), mask=is_query)


@triton.jit(do_not_specialize=("num_tokens", "num_heads", "scale"))
def packed_attention_backward_kernel(
    grad_y_ptr,  # (batch, num_tokens, num_heads, HEAD_DIM), contiguous, bfloat16 or float16
    qkv_ptr,  # (batch, num_tokens, 3, num_heads, HEAD_DIM), likewise
    y_ptr,  # like grad_y
    lse_ptr,  # (batch, num_heads, num_tokens) float32
    grad_qkv_ptr,  # like qkv
    column_ptr,  # (batch, 3, num_heads, HEAD_DIM) float32: sums of grad_qkv over tokens
    num_tokens: tl.int32,
    num_heads: tl.int32,
    scale: tl.float32,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """The gradient of qkv in its own layout, and its column sums for each image.

    Grid (batch * num_heads,). Memory: one read of qkv, y and grad_y, one write of grad_qkv.
    """
    head = tl.program_id(0).to(tl.int64)
    batch, head_in_row = head // num_heads, head % num_heads
    width = num_heads * HEAD_DIM
    start = batch * num_tokens * 3 * width + head_in_row * HEAD_DIM
    qkv_ptr += start
    grad_qkv_ptr += start
    y_ptr += batch * num_tokens * width + head_in_row * HEAD_DIM
    grad_y_ptr += batch * num_tokens * width + head_in_row * HEAD_DIM
    channel = tl.arange(0, HEAD_DIM)[None, :]
    key = tl.arange(0, KEYS)
    keys = key[:, None] * 3 * width + channel
    is_key = (key < num_tokens)[:, None]
    k = tl.load(qkv_ptr + width + keys, mask=is_key, other=0.0)
    v = tl.load(qkv_ptr + 2 * width + keys, mask=is_key, other=0.0)
    grad_k = tl.zeros([KEYS, HEAD_DIM], tl.float32)
    grad_v = tl.zeros([KEYS, HEAD_DIM], tl.float32)
    q_sum = tl.zeros([HEAD_DIM], tl.float32)
    for first in range(0, num_tokens, QUERIES):
        query = first + tl.arange(0, QUERIES)
        is_query = query < num_tokens
        queries = query[:, None] * 3 * width + channel
        rows = query[:, None] * width + channel
        q = tl.load(qkv_ptr + queries, mask=is_query[:, None], other=0.0)
        y = tl.load(y_ptr + rows, mask=is_query[:, None], other=0.0)
        grad_y = tl.load(grad_y_ptr + rows, mask=is_query[:, None], other=0.0)
        lse = tl.load(lse_ptr + head * num_tokens + query, mask=is_query, other=float("inf"))
        along = tl.sum(grad_y.to(tl.float32) * y.to(tl.float32), 1)
        p = tl.exp2(tl.dot(k, tl.trans(q)) * (scale * LOG2_E) - lse[None, :])  # (keys, queries), as all that follows
        p = tl.where(is_key, p, 0.0)
        grad_v = tl.dot(p.to(v.dtype), grad_y, grad_v)
        grad_score = (p * (tl.dot(v, tl.trans(grad_y)) - along[None, :])).to(k.dtype)
        grad_k = tl.dot(grad_score, q, grad_k)
        grad_q = tl.dot(tl.trans(grad_score), k) * scale
        q_sum += tl.sum(grad_q, 0)
        tl.store(grad_qkv_ptr + queries, grad_q.to(grad_qkv_ptr.dtype.element_ty), mask=is_query[:, None])
    grad_k *= scale
    tl.store(grad_qkv_ptr + width + keys, grad_k.to(grad_qkv_ptr.dtype.element_ty), mask=is_key)
    tl.store(grad_qkv_ptr + 2 * width + keys, grad_v.to(grad_qkv_ptr.dtype.element_ty), mask=is_key)
    column_ptr += batch * 3 * width + head_in_row * HEAD_DIM + tl.arange(0, HEAD_DIM)
    tl.store(column_ptr, q_sum)
    tl.store(column_ptr + width, tl.sum(grad_k, 0))
    tl.store(column_ptr + 2 * width, tl.sum(grad_v, 0))


def packed_attention_forward(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel on a contiguous `(batch, num_tokens, 3 * hidden_size)`.

    Returns:
        y `(batch, num_tokens, hidden_size)` and log2 of the softmax's sums `(batch, num_heads, num_tokens)`, float32.
    """
    batch, num_tokens, hidden_size = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    y = qkv.new_empty(batch, num_tokens, hidden_size)
    lse = qkv.new_empty(batch, num_heads, num_tokens, dtype=torch.float32)
    if qkv.numel():
        with torch.accelerator.device_index(qkv.device.index):  # pyright: ignore[reportArgumentType]
            packed_attention_forward_kernel[(batch * num_heads,)](
                qkv,
                y,
                lse,
                num_tokens,
                num_heads,
                scale,
                hidden_size // num_heads,
                _keys(num_tokens),
                QUERIES=64,
                num_warps=4,
            )
    return y, lse


def packed_attention_backward(
    grad_y: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; arguments are contiguous.

    Returns:
        The gradient of qkv, like qkv, and its column sums `(3 * hidden_size,)` in float32.
    """
    (batch, num_heads, num_tokens), hidden_size = lse.shape, y.shape[-1]
    grad_qkv, columns = torch.empty_like(qkv), qkv.new_empty(batch, 3 * hidden_size, dtype=torch.float32)
    if qkv.numel():
        with torch.accelerator.device_index(qkv.device.index):  # pyright: ignore[reportArgumentType]
            packed_attention_backward_kernel[(batch * num_heads,)](
                grad_y, qkv, y, lse, grad_qkv, columns, num_tokens, num_heads, scale,
                hidden_size // num_heads, _keys(num_tokens), QUERIES=32, num_warps=8,
            )  # fmt: skip
    return grad_qkv, columns.sum(0)


def _keys(num_tokens: int) -> int:
    return max(16, triton.next_power_of_2(num_tokens))
