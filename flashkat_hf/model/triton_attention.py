"""Triton kernels of self-attention for short sequences, from the product that holds queries, keys and values.

Queries, keys and values are read where that product put them and their gradients are written in its layout:
nothing is stacked, and the bias gradient comes along. Backward is two kernels that each make the scores
again, one for the queries' gradient and one for the keys' and values': no atomic additions, and registers for
enough programs.

A sequence is whole blocks and, where few tokens are left, a rest (`attention_blocks`). Each program meets the
edge, the rest or else the first tokens, before its loop over the others: with a rest that needs no masks, and
it always starts from a product instead of zeros, or ptxas would serialize its matrix instructions. The rest's
keys are too few for programs of their own, which cost nearly as much as others: each block of queries writes
what it adds to their gradients, and short programs add that up. Why so: docs/notes/attention-layout.md and
ptxas-serialized-products.md.
"""

import torch
from torch import Tensor

from .triton_launch import launch, planned
from .triton_math import tl, triton
from .triton_sums import gather_sums
from .triton_tiles import ATTENTION_BLOCK, attention_blocks

LOG2_E = tl.constexpr(1.4426950408889634)
TOKEN_BLOCK = tl.constexpr(ATTENTION_BLOCK)
STEP = tl.constexpr(32)  # keys or queries that a program looks at together
STAGES = tl.constexpr(3)  # of the loops' loads
WARPS = ATTENTION_BLOCK // 16
REGISTERS = 96  # of a thread: five programs fit a multiprocessor
KEYS_REGISTERS = 128  # in the keys' kernel: four programs
STATISTICS = tl.constexpr(
    4
)  # numbers for a query; two are written, but of so few each thread would load its own
planned_blocks = planned(attention_blocks)
UNSPECIALIZED = ("num_tokens", "num_heads", "scale")


@triton.jit
def walk(num_tokens, REST: tl.constexpr):
    """Return where the edge begins, and from where to where a program goes on in steps."""
    if REST:
        whole = (tl.num_programs(0) - 1) * TOKEN_BLOCK
        return whole, 0, whole
    else:
        return 0, STEP, num_tokens


@triton.jit
def load_keys(
    first, qkv_ptr, num_tokens, width, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr
):
    """Load KEYS keys and values from first on, (KEYS, HEAD_DIM).

    With MASKED those beyond the last one are the last one.
    """
    key = first + tl.arange(0, KEYS)
    inside = tl.minimum(key, num_tokens - 1) if MASKED else key
    keys = inside[:, None] * 3 * width + tl.arange(0, HEAD_DIM)[None, :]
    return key, tl.load(qkv_ptr + width + keys), tl.load(qkv_ptr + 2 * width + keys)


@triton.jit
def forward_step(
    first, qkv_ptr, q, largest, num_tokens, width, scale,
    HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return a block's largest scores so far, exponentials (queries, KEYS) for KEYS keys, and values."""
    key, k, v = load_keys(first, qkv_ptr, num_tokens, width, HEAD_DIM, KEYS, MASKED)
    score = tl.dot(q, tl.trans(k))
    if MASKED:
        score = tl.where((key < num_tokens)[None, :], score, float("-inf"))
    largest = tl.maximum(largest, tl.max(score, 1) * scale)
    return largest, tl.exp2(score * scale - largest[:, None]), v


@triton.jit(do_not_specialize=UNSPECIALIZED)
def packed_attention_forward_kernel(
    qkv_ptr,  # (batch, num_tokens, 3, num_heads, HEAD_DIM), contiguous, bfloat16 or float16
    y_ptr,  # (batch, num_tokens, num_heads, HEAD_DIM), likewise
    lse_ptr,  # (batch, num_heads, num_tokens) float32: log2 of the sum of exponentials
    num_tokens: tl.int32,
    num_heads: tl.int32,
    scale: tl.float32,  # positive
    HEAD_DIM: tl.constexpr,
    REST: tl.constexpr,
):
    """Compute y = softmax(scale q k^T) v for a block of queries of one head.

    Grid (blocks, num_heads, batch). Products in the input's dtype with float32 sums, softmax in float32, over
    STEP keys at a time. Memory: one read of qkv, one write of y; blocks of a head share it in the cache.
    """
    head_in_row, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = batch * num_heads + head_in_row
    width = num_heads * HEAD_DIM
    qkv_ptr += batch * num_tokens * 3 * width + head_in_row * HEAD_DIM
    y_ptr += batch * num_tokens * width + head_in_row * HEAD_DIM
    channel = tl.arange(0, HEAD_DIM)[None, :]
    query = tl.program_id(0) * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    q = tl.load(qkv_ptr + tl.minimum(query, num_tokens - 1)[:, None] * 3 * width + channel)
    scale = tl.cast(scale, tl.float32) * LOG2_E  # float64 when compiled: docs/notes/float64-arguments.md
    largest = tl.full([TOKEN_BLOCK], float("-inf"), tl.float32)
    edge, start, end = walk(num_tokens, REST)
    sizes = num_tokens, width, scale
    largest, edge_p, edge_v = forward_step(
        edge, qkv_ptr, q, largest, *sizes, HEAD_DIM, REST if REST else STEP, True
    )
    total = tl.sum(edge_p, 1)
    y = tl.dot(edge_p.to(edge_v.dtype), edge_v)
    for first in tl.range(start, end, STEP, num_stages=STAGES):
        larger, p, v = forward_step(first, qkv_ptr, q, largest, *sizes, HEAD_DIM, STEP, REST == 0)
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, 1)
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None])
        largest = larger
    y = y / total[:, None]
    is_query = query < num_tokens
    tl.store(y_ptr + query[:, None] * width + channel, y.to(y_ptr.dtype.element_ty), mask=is_query[:, None])
    tl.store(lse_ptr + head * num_tokens + query, largest + tl.log2(total), mask=is_query)


@triton.jit
def statistics_of(head, statistics_ptr, REST: tl.constexpr):
    """Return where a head's own statistics begin: whole blocks of rows, and those of the last block."""
    rows = (tl.num_programs(0) - 1) * TOKEN_BLOCK + (REST if REST else TOKEN_BLOCK)
    return statistics_ptr + head * rows * STATISTICS


@triton.jit
def queries_step(
    first, qkv_ptr, q, grad_y, lse, delta, num_tokens, width, scale,
    HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return KEYS keys, and as (queries, KEYS) softmax and the scores' gradient."""
    key, k, v = load_keys(first, qkv_ptr, num_tokens, width, HEAD_DIM, KEYS, MASKED)
    p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * LOG2_E) - lse[:, None])
    if MASKED:
        p = tl.where((key < num_tokens)[None, :], p, 0.0)
    grad_score = p * (tl.dot(grad_y, tl.trans(v)) - delta[:, None])
    return k, p.to(k.dtype), grad_score.to(k.dtype)


@triton.jit
def queries_gradient(
    block, grad_y_ptr, qkv_ptr, y_ptr, lse_ptr, grad_qkv_ptr, statistics_ptr, rest_ptr, column_ptr,
    num_tokens, num_heads, scale, HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a block's queries; arguments as the kernel's."""
    head_in_row, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = batch * num_heads + head_in_row
    width = num_heads * HEAD_DIM
    place = batch * num_tokens * width + head_in_row * HEAD_DIM
    grad_y_ptr += place
    y_ptr += place
    place += batch * num_tokens * 2 * width
    qkv_ptr += place
    grad_qkv_ptr += place
    channel = tl.arange(0, HEAD_DIM)[None, :]
    query = block * TOKEN_BLOCK + tl.arange(0, QUERIES)
    is_query = query < num_tokens
    inside = tl.minimum(query, num_tokens - 1)
    q = tl.load(qkv_ptr + inside[:, None] * 3 * width + channel)
    grad_y = tl.load(grad_y_ptr + inside[:, None] * width + channel)
    y = tl.load(y_ptr + inside[:, None] * width + channel)
    lse = tl.where(is_query, tl.load(lse_ptr + head * num_tokens + inside), float("inf"))
    delta = tl.sum(grad_y.to(tl.float32) * y.to(tl.float32), 1)
    statistics_ptr = statistics_of(head, statistics_ptr, REST) + query[:, None] * STATISTICS
    tl.store(statistics_ptr + tl.arange(0, 2)[None, :], tl.join(-lse, delta))
    edge, start, end = walk(num_tokens, REST)
    arguments = qkv_ptr, q, grad_y, lse, delta, num_tokens, width, scale
    edge_k, edge_p, edge_score = queries_step(edge, *arguments, HEAD_DIM, REST if REST else STEP, True)
    grad_q = tl.dot(edge_score, edge_k)
    if REST:
        key = tl.arange(0, REST)[:, None]
        rest_ptr += ((head * tl.num_programs(0) + block) * 2 * REST + key) * HEAD_DIM + channel
        is_key = edge + key < num_tokens
        # both factors transposed would be wrong by a bug of ptxas: docs/notes/ptxas-wrong-product.md
        tl.store(rest_ptr, tl.dot(tl.trans(edge_score), q), mask=is_key)
        tl.store(rest_ptr + REST * HEAD_DIM, tl.dot(tl.trans(edge_p), grad_y), mask=is_key)
    for first in tl.range(start, end, STEP, num_stages=STAGES):
        k, _, grad_score = queries_step(first, *arguments, HEAD_DIM, STEP, REST == 0)
        grad_q = tl.dot(grad_score, k, grad_q)
    grad_q = tl.where(is_query[:, None], grad_q * scale, 0.0)
    rows = query[:, None] * 3 * width + channel
    tl.store(grad_qkv_ptr + rows, grad_q.to(grad_qkv_ptr.dtype.element_ty), mask=is_query[:, None])
    column_ptr += (block * tl.num_programs(2) + batch) * 3 * width + head_in_row * HEAD_DIM
    tl.store(column_ptr + tl.arange(0, HEAD_DIM), tl.sum(grad_q, 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def packed_attention_queries_kernel(
    grad_y_ptr,  # (batch, num_tokens, num_heads, HEAD_DIM), contiguous, bfloat16 or float16
    qkv_ptr,  # (batch, num_tokens, 3, num_heads, HEAD_DIM), likewise
    y_ptr,  # like grad_y
    lse_ptr,  # (batch, num_heads, num_tokens) float32
    grad_qkv_ptr,  # like qkv
    statistics_ptr,  # (batch, num_heads, all rows of all blocks, STATISTICS) float32: -lse, and grad_y y^T
    rest_ptr,  # (batch, num_heads, blocks, 2, REST, HEAD_DIM) float32: for the rest's keys, values
    column_ptr,  # (all blocks, batch, 3, num_heads, HEAD_DIM) float32: sums of grad_qkv over a block's tokens
    num_tokens: tl.int32,
    num_heads: tl.int32,
    scale: tl.float32,
    HEAD_DIM: tl.constexpr,
    REST: tl.constexpr,
):
    """Compute the queries' gradient and statistics, and what they add to the rest's keys and values.

    Grid (blocks, num_heads, batch); with REST the last block has so many rows. Memory: one read of qkv, y and
    grad_y, one write of a third of grad_qkv.
    """
    block = tl.program_id(0)
    scale = tl.cast(scale, tl.float32)  # float64 when compiled: docs/notes/float64-arguments.md
    tensors = grad_y_ptr, qkv_ptr, y_ptr, lse_ptr, grad_qkv_ptr, statistics_ptr, rest_ptr, column_ptr
    sizes = num_tokens, num_heads, scale
    if REST == 0 or block < tl.num_programs(0) - 1:
        queries_gradient(block, *tensors, *sizes, HEAD_DIM, TOKEN_BLOCK, REST)
    else:
        queries_gradient(block, *tensors, *sizes, HEAD_DIM, REST, REST)


@triton.jit
def keys_step(
    first, qkv_ptr, grad_y_ptr, statistics_ptr, k, v, num_tokens, width, scale,
    HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return QUERIES queries, their grad_y, and as (keys, QUERIES) softmax and the scores' gradient."""
    channel = tl.arange(0, HEAD_DIM)[None, :]
    query = first + tl.arange(0, QUERIES)
    inside = tl.minimum(query, num_tokens - 1) if MASKED else query
    q = tl.load(qkv_ptr + inside[:, None] * 3 * width + channel)
    grad_y = tl.load(grad_y_ptr + inside[:, None] * width + channel)
    statistics = tl.load(statistics_ptr + query[:, None] * STATISTICS + tl.arange(0, STATISTICS)[None, :])
    written, _ = tl.split(tl.permute(tl.reshape(statistics, [QUERIES, 2, STATISTICS // 2]), [0, 2, 1]))
    negative_lse, delta = tl.split(written)
    p = tl.exp2(tl.dot(k, tl.trans(q)) * (scale * LOG2_E) + negative_lse[None, :])
    grad_score = p * (tl.dot(v, tl.trans(grad_y)) - delta[None, :])
    return q, grad_y, p.to(v.dtype), grad_score.to(k.dtype)


@triton.jit
def store_keys_gradients(
    grad_k, grad_v, grad_qkv_ptr, column_ptr, block, num_tokens, num_heads, scale,
    HEAD_DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a block's keys and values, grad_k yet without the scale, and their sums."""
    head_in_row, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    width = num_heads * HEAD_DIM
    key = block * TOKEN_BLOCK + tl.arange(0, KEYS)[:, None]
    is_key = key < num_tokens
    grad_k = tl.where(is_key, grad_k * scale, 0.0)
    grad_v = tl.where(is_key, grad_v, 0.0)
    channel = head_in_row * HEAD_DIM + tl.arange(0, HEAD_DIM)
    grad_qkv_ptr += ((batch * num_tokens + key) * 3 + 1) * width + channel[None, :]
    tl.store(grad_qkv_ptr, grad_k.to(grad_qkv_ptr.dtype.element_ty), mask=is_key)
    tl.store(grad_qkv_ptr + width, grad_v.to(grad_qkv_ptr.dtype.element_ty), mask=is_key)
    column_ptr += ((block * tl.num_programs(2) + batch) * 3 + 1) * width + channel
    tl.store(column_ptr, tl.sum(grad_k, 0))
    tl.store(column_ptr + width, tl.sum(grad_v, 0))


@triton.jit
def keys_gradients(
    block, grad_y_ptr, qkv_ptr, statistics_ptr, grad_qkv_ptr, column_ptr, num_tokens, num_heads, scale,
    HEAD_DIM: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a whole block's keys and values; scores stand as (keys, queries)."""
    head_in_row, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    width = num_heads * HEAD_DIM
    grad_y_ptr += batch * num_tokens * width + head_in_row * HEAD_DIM
    qkv_ptr += batch * num_tokens * 3 * width + head_in_row * HEAD_DIM
    statistics_ptr = statistics_of(batch * num_heads + head_in_row, statistics_ptr, REST)
    _, k, v = load_keys(block * TOKEN_BLOCK, qkv_ptr, num_tokens, width, HEAD_DIM, TOKEN_BLOCK, True)
    edge, start, end = walk(num_tokens, REST)
    arguments = qkv_ptr, grad_y_ptr, statistics_ptr, k, v, num_tokens, width, scale
    edge_q, edge_grad_y, edge_p, edge_score = keys_step(
        edge, *arguments, HEAD_DIM, REST if REST else STEP, True
    )
    grad_v = tl.dot(edge_p, edge_grad_y)
    grad_k = tl.dot(edge_score, edge_q)
    for first in tl.range(start, end, STEP, num_stages=STAGES):
        q, grad_y, p, grad_score = keys_step(first, *arguments, HEAD_DIM, STEP, REST == 0)
        grad_v = tl.dot(p, grad_y, grad_v)
        grad_k = tl.dot(grad_score, q, grad_k)
    sizes = num_tokens, num_heads, scale
    store_keys_gradients(grad_k, grad_v, grad_qkv_ptr, column_ptr, block, *sizes, HEAD_DIM, TOKEN_BLOCK)


@triton.jit
def rest_gradients(
    block, rest_ptr, grad_qkv_ptr, column_ptr, num_tokens, num_heads, scale,
    HEAD_DIM: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the rest's keys and values, sums over the blocks of queries."""
    head = tl.program_id(2).to(tl.int64) * num_heads + tl.program_id(1)
    key = tl.arange(0, REST)[:, None]
    is_key = block * TOKEN_BLOCK + key < num_tokens
    rest_ptr += (head * tl.num_programs(0) * 2 * REST + key) * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    grad_k = tl.zeros([REST, HEAD_DIM], tl.float32)
    grad_v = tl.zeros([REST, HEAD_DIM], tl.float32)
    for part in range(tl.num_programs(0)):
        part_ptr = rest_ptr + part * 2 * REST * HEAD_DIM
        grad_k += tl.load(part_ptr, mask=is_key, other=0.0)
        grad_v += tl.load(part_ptr + REST * HEAD_DIM, mask=is_key, other=0.0)
    sizes = num_tokens, num_heads, scale
    store_keys_gradients(grad_k, grad_v, grad_qkv_ptr, column_ptr, block, *sizes, HEAD_DIM, REST)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def packed_attention_keys_kernel(
    grad_y_ptr,  # (batch, num_tokens, num_heads, HEAD_DIM), contiguous, bfloat16 or float16
    qkv_ptr,  # (batch, num_tokens, 3, num_heads, HEAD_DIM), likewise
    statistics_ptr,  # from `packed_attention_queries_kernel`
    rest_ptr,  # likewise
    grad_qkv_ptr,  # like qkv
    column_ptr,  # (all blocks, batch, 3, num_heads, HEAD_DIM) float32: sums of grad_qkv over a block's tokens
    num_tokens: tl.int32,
    num_heads: tl.int32,
    scale: tl.float32,
    HEAD_DIM: tl.constexpr,
    REST: tl.constexpr,
):
    """Compute the gradients of keys and values.

    Grid (blocks, num_heads, batch). Memory: one read of qkv and grad_y, one write of two thirds of grad_qkv.
    """
    block = tl.program_id(0)
    scale = tl.cast(scale, tl.float32)  # float64 when compiled, too
    sizes = num_tokens, num_heads, scale
    if REST == 0 or block < tl.num_programs(0) - 1:
        tensors = grad_y_ptr, qkv_ptr, statistics_ptr, grad_qkv_ptr, column_ptr
        keys_gradients(block, *tensors, *sizes, HEAD_DIM, REST)
    else:
        rest_gradients(block, rest_ptr, grad_qkv_ptr, column_ptr, *sizes, HEAD_DIM, REST)


def packed_attention_forward(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel on a contiguous `(batch, num_tokens, 3 * hidden_size)`.

    Returns:
        y `(batch, num_tokens, hidden_size)` and log2 of the softmax's sums `(batch, num_heads, num_tokens)`,
        float32.
    """
    batch, num_tokens, hidden_size = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    y = qkv.new_empty(batch, num_tokens, hidden_size)
    lse = qkv.new_empty(batch, num_heads, num_tokens, dtype=torch.float32)
    launch_attention_forward(qkv, y, lse, scale)
    return y, lse


def launch_attention_forward(qkv: Tensor, y: Tensor, lse: Tensor, scale: float) -> None:
    """Launch the forward kernel, if there are elements."""
    batch, num_heads, num_tokens = lse.shape
    blocks, rest = planned_blocks(num_tokens)
    if qkv.numel():
        grid, numbers = (blocks, num_heads, batch), (num_tokens, num_heads, scale)
        kernel, constants = packed_attention_forward_kernel, (y.shape[-1] // num_heads, rest)
        launch(kernel, grid, (qkv, y, lse), numbers, constants, WARPS, REGISTERS)


def packed_attention_backward(
    grad_y: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernels and add up the columns in a fixed order; arguments are contiguous.

    Returns:
        The gradient of qkv, like qkv, and its column sums `(3 * hidden_size,)` in float32.
    """
    grad_qkv = torch.empty_like(qkv)
    rows, *sizes = attention_scratch(*lse.shape, y.shape[-1])
    scratch = [lse.new_empty(size) for size in sizes]
    launch_attention_backward(grad_y, qkv, y, lse, grad_qkv, *scratch, scale=scale)
    columns = scratch[-1].view(1, rows, qkv.shape[-1])
    return grad_qkv, gather_sums(None, None, columns)[0].squeeze(0)


def attention_scratch(
    batch: int, num_heads: int, num_tokens: int, hidden_size: int
) -> tuple[int, int, int, int]:
    """Return the rows of column sums, and how many numbers the statistics, rests and columns are."""
    blocks, rest = planned_blocks(num_tokens)
    rows = (blocks - 1) * ATTENTION_BLOCK + (rest or ATTENTION_BLOCK)
    statistics = batch * num_heads * rows * STATISTICS.value
    rests = batch * blocks * 2 * rest * hidden_size
    return blocks * batch, statistics, rests, blocks * batch * 3 * hidden_size


def launch_attention_backward(
    grad_y: Tensor,
    qkv: Tensor,
    y: Tensor,
    lse: Tensor,
    grad_qkv: Tensor,
    statistics: Tensor,
    rests: Tensor,
    columns: Tensor,
    scale: float,
) -> None:
    """Launch the backward kernels, if there are elements; `attention_scratch` are those of the last three."""
    batch, num_heads, num_tokens = lse.shape
    blocks, rest = planned_blocks(num_tokens)
    if qkv.numel():
        grid, numbers = (blocks, num_heads, batch), (num_tokens, num_heads, scale)
        constants = y.shape[-1] // num_heads, rest
        queries = grad_y, qkv, y, lse, grad_qkv, statistics, rests, columns
        launch(packed_attention_queries_kernel, grid, queries, numbers, constants, WARPS, REGISTERS)
        keys = grad_y, qkv, statistics, rests, grad_qkv, columns
        launch(packed_attention_keys_kernel, grid, keys, numbers, constants, WARPS, KEYS_REGISTERS)
