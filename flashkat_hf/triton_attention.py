"""Triton kernels of self-attention for short sequences, from the product that holds queries, keys and values.

Queries, keys and values are read where that product put them and their gradients are written in its layout: nothing is
stacked, and the bias gradient comes along. Backward is two kernels that each make the scores again, one for the
queries' gradient and one for the keys' and values': no atomic additions, and registers for enough programs.

Tokens beyond the last one read the last one again, so no load is masked; their scores are taken out instead. Where few
tokens are left beyond whole blocks, backward's last program of a head takes only so many rows; forward gains nothing.
"""

import torch
from torch import Tensor

try:  # transformers takes what checkpoint code imports elsewhere for a requirement
    import triton
    import triton.language as tl
except ImportError:
    raise

from .triton_rational import traceable
from .triton_sums import gather_sums
from .triton_tiles import ATTENTION_BLOCK, attention_blocks

LOG2_E = tl.constexpr(1.4426950408889634)
BLOCK = tl.constexpr(ATTENTION_BLOCK)
STEP = tl.constexpr(32)  # keys or queries that a program looks at together
REST_STEP = tl.constexpr(64)  # queries that a program for few keys looks at: it has to be done soon
WARPS = ATTENTION_BLOCK // 16
KEYS_REGISTERS = 128  # of a thread: four programs fit a multiprocessor, and only two registers less than it would take
SIZES = ("num_tokens", "num_heads", "scale")


@triton.jit(do_not_specialize=SIZES)
def packed_attention_forward_kernel(
    qkv_ptr,  # (batch, num_tokens, 3, num_heads, HEAD_DIM), contiguous, bfloat16 or float16
    y_ptr,  # (batch, num_tokens, num_heads, HEAD_DIM), likewise
    lse_ptr,  # (batch, num_heads, num_tokens) float32: log2 of the sum of exponentials
    num_tokens: tl.int32,
    num_heads: tl.int32,
    scale: tl.float32,
    HEAD_DIM: tl.constexpr,
):
    """Y = softmax(scale q k^T) v for a block of queries of one head.

    Grid (blocks, num_heads, batch). Products in the input's dtype with float32 sums, softmax in
    float32, over STEP keys at a time. Memory: one read of qkv, one write of y; blocks of a head share it in the cache.
    """
    head_in_row, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = batch * num_heads + head_in_row
    width = num_heads * HEAD_DIM
    qkv_ptr += batch * num_tokens * 3 * width + head_in_row * HEAD_DIM
    y_ptr += batch * num_tokens * width + head_in_row * HEAD_DIM
    channel = tl.arange(0, HEAD_DIM)[None, :]
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    q = tl.load(qkv_ptr + tl.minimum(query, num_tokens - 1)[:, None] * 3 * width + channel)
    scale = tl.cast(scale, tl.float32)  # torch.compile passes float64
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    y = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for first in tl.range(0, num_tokens, STEP, num_stages=3):
        key = first + tl.arange(0, STEP)
        keys = tl.minimum(key, num_tokens - 1)[:, None] * 3 * width + channel
        k = tl.load(qkv_ptr + width + keys)
        v = tl.load(qkv_ptr + 2 * width + keys)
        score = tl.dot(q, tl.trans(k)) * (scale * LOG2_E)
        score = tl.where((key < num_tokens)[None, :], score, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, 1))
        shrink = tl.exp2(largest - larger)
        p = tl.exp2(score - larger[:, None])
        total = total * shrink + tl.sum(p, 1)
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None])
        largest = larger
    y = y / total[:, None]
    is_query = query < num_tokens
    tl.store(y_ptr + query[:, None] * width + channel, y.to(y_ptr.dtype.element_ty), mask=is_query[:, None])
    tl.store(lse_ptr + head * num_tokens + query, largest + tl.log2(total), mask=is_query)


@triton.jit
def queries_gradient(
    block, grad_y_ptr, qkv_ptr, y_ptr, lse_ptr, grad_qkv_ptr, along_ptr, column_ptr, num_tokens, num_heads, scale,
    HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of a block's queries; arguments as the kernel's."""
    head_in_row, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = batch * num_heads + head_in_row
    width = num_heads * HEAD_DIM
    start = batch * num_tokens * width + head_in_row * HEAD_DIM
    grad_y_ptr += start
    y_ptr += start
    start += batch * num_tokens * 2 * width
    qkv_ptr += start
    grad_qkv_ptr += start
    channel = tl.arange(0, HEAD_DIM)[None, :]
    query = block * BLOCK + tl.arange(0, QUERIES)
    is_query = query < num_tokens
    inside = tl.minimum(query, num_tokens - 1)
    q = tl.load(qkv_ptr + inside[:, None] * 3 * width + channel)
    grad_y = tl.load(grad_y_ptr + inside[:, None] * width + channel)
    y = tl.load(y_ptr + inside[:, None] * width + channel)
    lse = tl.load(lse_ptr + head * num_tokens + inside)
    along = tl.sum(grad_y.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(along_ptr + head * num_tokens + query, along, mask=is_query)
    grad_q = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    for first in tl.range(0, num_tokens, KEYS, num_stages=STAGES):
        key = first + tl.arange(0, KEYS)
        keys = tl.minimum(key, num_tokens - 1)[:, None] * 3 * width + channel
        k = tl.load(qkv_ptr + width + keys)
        v = tl.load(qkv_ptr + 2 * width + keys)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * LOG2_E) - lse[:, None])
        p = tl.where((key < num_tokens)[None, :], p, 0.0)
        grad_score = p * (tl.dot(grad_y, tl.trans(v)) - along[:, None])
        grad_q = tl.dot(grad_score.to(k.dtype), k, grad_q)
    grad_q = tl.where(is_query[:, None], grad_q * scale, 0.0)
    rows = query[:, None] * 3 * width + channel
    tl.store(grad_qkv_ptr + rows, grad_q.to(grad_qkv_ptr.dtype.element_ty), mask=is_query[:, None])
    column_ptr += (block * tl.num_programs(2) + batch) * 3 * width + head_in_row * HEAD_DIM
    tl.store(column_ptr + tl.arange(0, HEAD_DIM), tl.sum(grad_q, 0))


@triton.jit(do_not_specialize=SIZES)
def packed_attention_queries_kernel(
    grad_y_ptr,  # (batch, num_tokens, num_heads, HEAD_DIM), contiguous, bfloat16 or float16
    qkv_ptr,  # (batch, num_tokens, 3, num_heads, HEAD_DIM), likewise
    y_ptr,  # like grad_y
    lse_ptr,  # (batch, num_heads, num_tokens) float32
    grad_qkv_ptr,  # like qkv
    along_ptr,  # (batch, num_heads, num_tokens) float32: grad_y y^T
    column_ptr,  # (all blocks, batch, 3, num_heads, HEAD_DIM) float32: sums of grad_qkv over a block's tokens
    num_tokens: tl.int32,
    num_heads: tl.int32,
    scale: tl.float32,
    HEAD_DIM: tl.constexpr,
    REST: tl.constexpr,
):
    """The queries' gradient, and what the other kernel needs of grad_y y^T.

    Grid (blocks, num_heads, batch); with REST the last block has so many rows. Memory: one read of qkv, y and grad_y,
    one write of a third of grad_qkv.
    """
    block = tl.program_id(0)
    tensors = grad_y_ptr, qkv_ptr, y_ptr, lse_ptr, grad_qkv_ptr, along_ptr, column_ptr
    sizes = num_tokens, num_heads, scale
    if REST == 0 or block < tl.num_programs(0) - 1:
        queries_gradient(block, *tensors, *sizes, HEAD_DIM, BLOCK, STEP, 3)
    else:
        queries_gradient(block, *tensors, *sizes, HEAD_DIM, REST, STEP, 3)


@triton.jit
def scores(
    first, qkv_ptr, grad_y_ptr, lse_ptr, along_ptr, k, v, num_tokens, width, scale,
    HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Of queries from first on with a block's keys: q, grad_y, and as (keys, queries) softmax and scores' gradient."""
    channel = tl.arange(0, HEAD_DIM)[None, :]
    query = first + tl.arange(0, QUERIES)
    inside = tl.minimum(query, num_tokens - 1)
    q = tl.load(qkv_ptr + inside[:, None] * 3 * width + channel)
    grad_y = tl.load(grad_y_ptr + inside[:, None] * width + channel)
    # Four copies of each, or the compiler has every thread load what it needs of them: a third of the instructions.
    copies = inside[:, None] + tl.zeros([1, 4], tl.int32)
    lse, along = tl.max(tl.load(lse_ptr + copies), 1), tl.max(tl.load(along_ptr + copies), 1)
    lse = tl.where(query < num_tokens, lse, float("inf"))
    p = tl.exp2(tl.dot(k, tl.trans(q)) * (scale * LOG2_E) - lse[None, :])
    grad_score = p * (tl.dot(v, tl.trans(grad_y)) - along[None, :])
    return q, grad_y, p.to(v.dtype), grad_score.to(k.dtype)


@triton.jit
def keys_gradients(
    block, grad_y_ptr, qkv_ptr, lse_ptr, along_ptr, grad_qkv_ptr, column_ptr, num_tokens, num_heads, scale,
    HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of a block's keys and values; scores stand as (keys, queries); arguments as the kernel's."""
    head_in_row, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = batch * num_heads + head_in_row
    width = num_heads * HEAD_DIM
    start = batch * num_tokens * width + head_in_row * HEAD_DIM
    grad_y_ptr += start
    start += batch * num_tokens * 2 * width
    qkv_ptr += start
    grad_qkv_ptr += start
    lse_ptr += head * num_tokens
    along_ptr += head * num_tokens
    channel = tl.arange(0, HEAD_DIM)[None, :]
    key = block * BLOCK + tl.arange(0, KEYS)
    is_key = (key < num_tokens)[:, None]
    keys = tl.minimum(key, num_tokens - 1)[:, None] * 3 * width + channel
    k = tl.load(qkv_ptr + width + keys)
    v = tl.load(qkv_ptr + 2 * width + keys)
    arguments = qkv_ptr, grad_y_ptr, lse_ptr, along_ptr, k, v, num_tokens, width, scale
    # Accumulators that start from a product, not from zeros: else ptxas serializes the loop's products.
    q, grad_y, p, grad_score = scores(0, *arguments, HEAD_DIM, QUERIES)
    grad_v = tl.dot(p, grad_y)
    grad_k = tl.dot(grad_score, q)
    for first in tl.range(QUERIES, num_tokens, QUERIES, num_stages=STAGES):
        q, grad_y, p, grad_score = scores(first, *arguments, HEAD_DIM, QUERIES)
        grad_v = tl.dot(p, grad_y, grad_v)
        grad_k = tl.dot(grad_score, q, grad_k)
    grad_k = tl.where(is_key, grad_k * scale, 0.0)
    grad_v = tl.where(is_key, grad_v, 0.0)
    rows = key[:, None] * 3 * width + channel
    tl.store(grad_qkv_ptr + width + rows, grad_k.to(grad_qkv_ptr.dtype.element_ty), mask=is_key)
    tl.store(grad_qkv_ptr + 2 * width + rows, grad_v.to(grad_qkv_ptr.dtype.element_ty), mask=is_key)
    column_ptr += (block * tl.num_programs(2) + batch) * 3 * width + head_in_row * HEAD_DIM
    tl.store(column_ptr + width + tl.arange(0, HEAD_DIM), tl.sum(grad_k, 0))
    tl.store(column_ptr + 2 * width + tl.arange(0, HEAD_DIM), tl.sum(grad_v, 0))


@triton.jit(do_not_specialize=SIZES)
def packed_attention_keys_kernel(
    grad_y_ptr,  # (batch, num_tokens, num_heads, HEAD_DIM), contiguous, bfloat16 or float16
    qkv_ptr,  # (batch, num_tokens, 3, num_heads, HEAD_DIM), likewise
    lse_ptr,  # (batch, num_heads, num_tokens) float32
    along_ptr,  # (batch, num_heads, num_tokens) float32, from `packed_attention_queries_kernel`
    grad_qkv_ptr,  # like qkv
    column_ptr,  # (all blocks, batch, 3, num_heads, HEAD_DIM) float32: sums of grad_qkv over a block's tokens
    num_tokens: tl.int32,
    num_heads: tl.int32,
    scale: tl.float32,
    HEAD_DIM: tl.constexpr,
    REST: tl.constexpr,
):
    """The gradients of keys and values.

    Grid (blocks, num_heads, batch); with REST the last block has so many rows. Memory: one read of qkv and grad_y, one
    write of two thirds of grad_qkv.
    """
    block = tl.program_id(0)
    tensors = grad_y_ptr, qkv_ptr, lse_ptr, along_ptr, grad_qkv_ptr, column_ptr
    sizes = num_tokens, num_heads, scale
    if REST == 0 or block < tl.num_programs(0) - 1:
        keys_gradients(block, *tensors, *sizes, HEAD_DIM, STEP, BLOCK, 3)
    else:
        keys_gradients(block, *tensors, *sizes, HEAD_DIM, REST_STEP, REST, 1)


def packed_attention_forward(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel on a contiguous `(batch, num_tokens, 3 * hidden_size)`.

    Returns:
        y `(batch, num_tokens, hidden_size)` and log2 of the softmax's sums `(batch, num_heads, num_tokens)`, float32.
    """
    batch, num_tokens, hidden_size = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    y = qkv.new_empty(batch, num_tokens, hidden_size)
    lse = qkv.new_empty(batch, num_heads, num_tokens, dtype=torch.float32)
    blocks, _ = attention_blocks(num_tokens)
    if qkv.numel():
        sizes = num_tokens, num_heads, scale, hidden_size // num_heads
        with torch.accelerator.device_index(qkv.device.index):  # pyright: ignore[reportArgumentType]
            traceable(packed_attention_forward_kernel)[blocks, num_heads, batch](qkv, y, lse, *sizes, num_warps=WARPS)
    return y, lse


def packed_attention_backward(
    grad_y: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernels and add up the columns in a fixed order; arguments are contiguous.

    Returns:
        The gradient of qkv, like qkv, and its column sums `(3 * hidden_size,)` in float32.
    """
    (batch, num_heads, num_tokens), hidden_size = lse.shape, y.shape[-1]
    grad_qkv, along = torch.empty_like(qkv), torch.empty_like(lse)
    blocks, rest = attention_blocks(num_tokens)
    columns = qkv.new_empty(1, blocks * batch, 3 * hidden_size, dtype=torch.float32)
    if qkv.numel():
        sizes = num_tokens, num_heads, scale, hidden_size // num_heads
        grid = blocks, num_heads, batch
        with torch.accelerator.device_index(qkv.device.index):  # pyright: ignore[reportArgumentType]
            packed_attention_queries_kernel[grid](
                grad_y, qkv, y, lse, grad_qkv, along, columns, *sizes, rest, num_warps=WARPS
            )
            limit = {"maxnreg": KEYS_REGISTERS} if qkv.is_cuda and not torch.version.hip else {}
            packed_attention_keys_kernel[grid](
                grad_y, qkv, lse, along, grad_qkv, columns, *sizes, rest, num_warps=WARPS, **limit
            )
    return grad_qkv, gather_sums(None, None, columns)[0].squeeze(0)
