"""A whole block by its kernels and PyTorch's matrix products: a forward, a backward, one gathering of sums.

What backward's kernels sum up lies in one piece of memory, and one launch turns it into the gradients of all
tables, biases and norms. Weights are cast to the products' dtype together, their gradients likewise back.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .triton_attention import attention_scratch, launch_attention_backward, launch_attention_forward
from .triton_launch import launch, planned
from .triton_math import tl, triton
from .triton_norm import launch_norm_backward, launch_norm_forward, row_plan
from .triton_norm_rational import (
    launch_norm_rational_backward,
    launch_norm_rational_forward,
    norm_rational_backward_plan,
)
from .triton_rational import rational_forward
from .triton_rational_mlp import launch_mlp_backward, linear_plan, mlp_backward_plan, rational_mlp_forward
from .triton_sums import COLUMNS, NUM_WARPS, TILE, column_sums, table_sums, tile_of
from .triton_tiles import NORM_BACKWARD

LINE = 256  # bytes; pieces of one allocation start as far apart, so that products take the same kernels


class Block(NamedTuple):
    """What a block's tensors do not say."""

    num_heads: int
    scale: float
    eps1: float
    eps2: float
    dtype: torch.dtype  # of the products, half precision


class Parameters(NamedTuple):
    """A block's parameters, all contiguous and on one device; dtypes are any but float64."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    numerator1: Tensor
    denominator1: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    numerator2: Tensor
    denominator2: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


class Saved(NamedTuple):
    """What backward needs of forward, in the products' dtype where nothing else is said."""

    x: Tensor
    normed: Tensor
    qkv: Tensor
    mixed: Tensor
    total: Tensor  # in x's dtype
    act: Tensor
    product: Tensor
    mean1: Tensor  # these five in float32
    rstd1: Tensor
    lse: Tensor
    mean2: Tensor
    rstd2: Tensor
    qkv_weight: Tensor
    proj_weight: Tensor
    fc1_weight: Tensor
    fc2_weight: Tensor
    norm1_weight: Tensor  # these seven as the parameters are
    norm2_weight: Tensor
    norm2_bias: Tensor
    numerator1: Tensor
    denominator1: Tensor
    numerator2: Tensor
    denominator2: Tensor


TABLE = ("offset", "rows", "segments", "rows_a", "rows_b", "place")
SUMS = ("offset", "rows", "width", "first", "place")


@triton.jit(
    do_not_specialize=(
        *(f"{name}_{i}" for i in "12" for name in TABLE),
        *(f"{name}_{i}" for i in "pqrs" for name in SUMS),
    )
)
def gather_block_sums_kernel(
    scratch_ptr,  # float32: the partial sums of two tables and four sets of columns
    denominator1_ptr,  # (rows_b_1, 4), any float
    denominator2_ptr,  # (rows_b_2, 4), any float
    sum_ptr,  # float32: at `place` the gradients of a numerator and its denominator, or the column sums
    offset_1: tl.int64, rows_1: tl.int32, segments_1: tl.int32,
    rows_a_1: tl.int32, rows_b_1: tl.int32, place_1: tl.int32,
    offset_2: tl.int64, rows_2: tl.int32, segments_2: tl.int32,
    rows_a_2: tl.int32, rows_b_2: tl.int32, place_2: tl.int32,
    offset_p: tl.int64, rows_p: tl.int32, width_p: tl.int32, first_p: tl.int32, place_p: tl.int32,
    offset_q: tl.int64, rows_q: tl.int32, width_q: tl.int32, first_q: tl.int32, place_q: tl.int32,
    offset_r: tl.int64, rows_r: tl.int32, width_r: tl.int32, first_r: tl.int32, place_r: tl.int32,
    offset_s: tl.int64, rows_s: tl.int32, width_s: tl.int32, first_s: tl.int32, place_s: tl.int32,
    ROWS_1: tl.constexpr,
    SEGMENTS_1: tl.constexpr,
    ROWS_2: tl.constexpr,
    SEGMENTS_2: tl.constexpr,
    COLUMN_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute what a `gather_sums_kernel` for each table and set would, in the same order of additions.

    Grid (20 + blocks of columns,): ten programs a table, then one for each COLUMNS columns; a set's begin at
    `first`, and its next row of sums stands the columns of whole blocks behind.
    """
    program = tl.program_id(0)
    if program < 10:
        ptr = sum_ptr + place_1
        pointers = scratch_ptr + offset_1, denominator1_ptr, ptr, ptr + rows_a_1 * 6
        table_sums(program, *pointers, rows_1, segments_1, rows_a_1, rows_b_1, ROWS_1, SEGMENTS_1)
    elif program < 20:
        ptr = sum_ptr + place_2
        pointers = scratch_ptr + offset_2, denominator2_ptr, ptr, ptr + rows_a_2 * 6
        table_sums(program - 10, *pointers, rows_2, segments_2, rows_a_2, rows_b_2, ROWS_2, SEGMENTS_2)
    else:
        offset, rows, width, first, place = offset_p, rows_p, width_p, first_p, place_p
        if program >= first_q:
            offset, rows, width, first, place = offset_q, rows_q, width_q, first_q, place_q
        if program >= first_r:
            offset, rows, width, first, place = offset_r, rows_r, width_r, first_r, place_r
        if program >= first_s:
            offset, rows, width, first, place = offset_s, rows_s, width_s, first_s, place_s
        blocks = tl.cdiv(width, COLUMNS)
        block, row = (program - first) % blocks, (program - first) // blocks
        column_ptr = scratch_ptr + offset + row.to(tl.int64) * rows * width
        sums_ptr = sum_ptr + place + row * blocks * COLUMNS
        column_sums(block, column_ptr, sums_ptr, rows, width, COLUMN_ROWS, COLUMNS)


def block_forward(x: Tensor, parameters: Parameters, block: Block, keep: bool) -> tuple[Tensor, Saved | None]:
    """Compute a block; x is `(batch, num_tokens, hidden_size)`, contiguous, and not empty.

    Returns:
        The block's output, and with `keep` what backward needs.
    """
    p, (batch, num_tokens, hidden_size) = parameters, x.shape
    weights = (p.qkv_weight, p.proj_weight, p.fc1_weight, p.fc2_weight)
    biases = p.qkv_bias, p.proj_bias, p.fc1_bias, p.fc2_bias
    qkv_weight, proj_weight, fc1_weight, fc2_weight, *biases = cast((*weights, *biases), block.dtype)
    rows = batch * num_tokens
    statistics = (rows, rows, rows * block.num_heads, rows, rows)
    mean1, rstd1, lse, mean2, rstd2 = pieces(x, torch.float32, statistics)
    lse = lse.view(batch, block.num_heads, num_tokens)
    normed, mixed, act = [torch.empty_like(x, dtype=block.dtype) for _ in range(3)]
    total = torch.empty_like(x)
    launch_norm_forward(x, p.norm1_weight, p.norm1_bias, normed, mean1, rstd1, eps=block.eps1)
    qkv = linear(normed, qkv_weight, biases[0])
    launch_attention_forward(qkv, mixed, lse, block.scale)
    branch = linear(mixed, proj_weight, biases[1])
    norm2 = p.norm2_weight, p.norm2_bias, p.numerator1, p.denominator1
    launch_norm_rational_forward(x, branch, *norm2, total, act, mean2, rstd2, eps=block.eps2)
    tables = p.numerator2, p.denominator2
    if linear_plan(rows, hidden_size, p.fc1_weight.shape[0], tables[0].shape[0], tables[1].shape[0]):
        hidden, product = rational_mlp_forward(act, fc1_weight, p.fc1_bias, *tables, keep)
    else:
        product = linear(act, fc1_weight, biases[2])
        hidden = rational_forward(product, *tables)
    y = total + linear(hidden, fc2_weight, biases[3])
    if not keep:
        return y, None
    activations = x, normed, qkv, mixed, total, act, product, mean1, rstd1, lse, mean2, rstd2
    norms = p.norm1_weight, p.norm2_weight, p.norm2_bias
    tables = p.numerator1, p.denominator1, p.numerator2, p.denominator2
    return y, Saved(*activations, qkv_weight, proj_weight, fc1_weight, fc2_weight, *norms, *tables)


def block_backward(
    grad: Tensor, saved: Saved, block: Block, dtypes: Sequence[torch.dtype | None], wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Compute a block's gradients.

    Args:
        grad: of the block's output, contiguous.
        saved: from `block_forward`.
        block: likewise.
        dtypes: of the parameters; None for one that there is not.
        wanted: which parameters need a gradient; the others' may be missing.

    Returns:
        The gradient of x, and those of `Parameters`.
    """
    s, (batch, num_tokens, hidden_size) = saved, saved.x.shape
    rows, inner = batch * num_tokens, s.product.shape[-1]
    table1, table2 = (s.numerator1, s.denominator1), (s.numerator2, s.denominator2)
    mlp_plan = mlp_backward_plan(s.product, *table2)
    norm2_plan = norm_rational_backward_plan(s.total, *table1, totals=True)
    norm1_plan = row_plan(s.x, hidden_size, NORM_BACKWARD)
    plan = gather_plan(
        *(hidden_size, inner, mlp_plan[2], mlp_plan[1][1]),
        *(norm2_plan[0].num_programs * norm2_plan[0].rows, norm2_plan[1][1]),
        *(norm1_plan[0].num_programs * norm1_plan[0].rows, *attention_scratch(*s.lse.shape, hidden_size)),
        *[table.shape[0] for table in (*table1, *table2)],
    )
    scratch = s.x.new_empty(plan.scratch_size, dtype=torch.float32)
    partial1, partial2, *columns, statistics, rests = scratch.split_with_sizes(plan.scratch)[::2]
    columns_norm2, columns_fc1, columns_qkv, columns_norm1 = columns
    grad_rows = grad.to(block.dtype).view(rows, hidden_size)
    grad_hidden = grad_rows.mm(s.fc2_weight)
    grad_product, hidden = torch.empty_like(s.product), torch.empty_like(s.product)
    tensors = grad_hidden, s.product, *table2, grad_product, hidden, partial2, columns_fc1
    launch_mlp_backward(*tensors, plan=mlp_plan)
    products: list[Tensor | None] = [None] * 4  # the gradients of weights
    if wanted[14]:
        products[3] = grad_rows.t().mm(hidden.view(rows, inner))
    grad_product = grad_product.view(rows, inner)
    if wanted[10]:
        products[2] = grad_product.t().mm(s.act.view(rows, hidden_size))
    grad_act = grad_product.mm(s.fc1_weight)
    grad_total = torch.empty_like(s.total)
    inputs = grad, grad_act, s.total, s.mean2, s.rstd2, s.norm2_weight, s.norm2_bias, *table1
    launch_norm_rational_backward(*inputs, grad_total, partial1, columns_norm2, plan=norm2_plan, totals=True)
    grad_rows = grad_total.to(block.dtype).view(rows, hidden_size)
    if wanted[4]:
        products[1] = grad_rows.t().mm(s.mixed.view(rows, hidden_size))
    grad_mixed, grad_qkv = grad_rows.mm(s.proj_weight), torch.empty_like(s.qkv)
    tensors = grad_mixed, s.qkv, s.mixed, s.lse, grad_qkv, statistics, rests, columns_qkv
    launch_attention_backward(*tensors, scale=block.scale)
    grad_qkv = grad_qkv.view(rows, 3 * hidden_size)
    if wanted[2]:
        products[0] = grad_qkv.t().mm(s.normed.view(rows, hidden_size))
    inputs = grad_total, grad_qkv.mm(s.qkv_weight), s.x, s.mean1, s.rstd1, s.norm1_weight
    launch_norm_backward(*inputs, grad_total, columns_norm1, plan=norm1_plan)  # a row is read before written
    sums = s.x.new_empty(plan.sums_size, dtype=torch.float32)
    tensors = scratch, s.denominator1, s.denominator2, sums
    launch(gather_block_sums_kernel, (plan.programs, 1, 1), tensors, plan.numbers, plan.constants, NUM_WARPS)
    norm2_weight, norm2_bias, proj_bias, fc2_bias, fc1_bias, qkv_bias, norm1_weight, norm1_bias, *tables = (
        sums.split_with_sizes(plan.sums)[::2]
    )
    tables = [*map(Tensor.view_as, tables, (*table1, *table2))]
    qkv_weight, proj_weight, fc1_weight, fc2_weight = cast(products, dtypes[2])
    gradients = (
        *(norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, norm2_weight, norm2_bias),
        *(*tables[:2], fc1_weight, fc1_bias, *tables[2:], fc2_weight, fc2_bias),
    )
    return grad_total, [
        None if dtype is None else grad if grad is None or grad.dtype == dtype else grad.to(dtype)
        for grad, dtype in zip(gradients, dtypes, strict=True)
    ]


def cast(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Return tensors in `dtype`; those that are not yet are copied by one launch, into one allocation."""
    others = [tensor for tensor in tensors if tensor is not None and tensor.dtype != dtype]
    if not others:
        return list(tensors)
    copies = pieces(others[0], dtype, [*map(Tensor.numel, others)])
    copies = [*map(Tensor.view_as, copies, others)]
    torch._foreach_copy_(copies, others)
    copy = iter(copies)
    return [tensor if tensor is None or tensor.dtype == dtype else next(copy) for tensor in tensors]


def pieces(like: Tensor, dtype: torch.dtype, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Return flat tensors of these sizes, pieces of one allocation that is made as `like` was."""
    total, splits = padded(dtype.itemsize, *sizes)
    return like.new_empty(total, dtype=dtype).split_with_sizes(splits)[::2]


@planned
def padded(element_bytes: int, *sizes: int) -> tuple[int, list[int]]:
    """Return the size of an allocation of so many pieces, and in turns the piece's size and a gap's."""
    line = LINE // element_bytes
    splits = [part for size in sizes for part in (size, -size % line)]
    return sum(splits), splits


class GatherPlan(NamedTuple):
    scratch_size: int
    scratch: list[int]  # what `padded` returns: both partial sums, four sets of columns, the attention's two
    sums_size: int
    sums: list[int]  # in turns a gradient's size and a gap's: eight columns, four tables
    numbers: tuple[int, ...]
    constants: tuple[int, ...]
    programs: int


@planned
def gather_plan(
    hidden_size: int, inner_size: int, mlp_rows: int, mlp_segments: int, norm2_rows: int, norm2_segments: int,
    norm1_rows: int, attention_rows: int, statistics: int, rests: int, _: int, *table_rows: int,
) -> GatherPlan:  # fmt: skip
    """Return where `block_backward` puts its partial sums and their sums; arguments as it computes them."""
    rows_a1, rows_b1, rows_a2, rows_b2 = table_rows
    sets = (  # sets of sums, rows, columns
        (4, norm2_rows, hidden_size),
        (1, mlp_rows, inner_size),
        (1, attention_rows, 3 * hidden_size),
        (2, norm1_rows, hidden_size),
    )
    partials = 10 * norm2_rows * norm2_segments, 10 * mlp_rows * mlp_segments
    scratch_size, scratch = padded(
        4, *partials, *(n * rows * width for n, rows, width in sets), statistics, rests
    )
    offsets = [sum(scratch[: 2 * i]) for i in range(len(scratch) // 2)]
    columns: list[int] = []  # numbers of the sets
    sums: list[int] = []
    first = 20
    for (count, rows, width), offset in zip(sets, offsets[2:6], strict=True):
        columns += offset, rows, width, first, sum(sums)
        sums += [width, -width % COLUMNS] * count
        first += count * triton.cdiv(width, COLUMNS)
    tables: list[int] = []
    for offset, rows, segments, rows_a, rows_b in (
        (offsets[0], norm2_rows, norm2_segments, rows_a1, rows_b1),
        (offsets[1], mlp_rows, mlp_segments, rows_a2, rows_b2),
    ):
        tables += offset, rows, segments, rows_a, rows_b, sum(sums)
        sums += 6 * rows_a, 0, 4 * rows_b, -(6 * rows_a + 4 * rows_b) % COLUMNS
    constants = *tile_of(norm2_segments), *tile_of(mlp_segments), TILE // COLUMNS, COLUMNS
    return GatherPlan(scratch_size, scratch, sum(sums), sums, (*tables, *columns), constants, programs=first)
