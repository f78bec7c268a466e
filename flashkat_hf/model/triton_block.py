"""A whole block by its kernels and PyTorch's matrix products: a forward, a backward, one gathering of sums.

What backward's kernels sum up lies in one piece of memory, and one launch turns it into the gradients of all
tables, biases and norms. Weights are cast to the products' dtype together, their gradients likewise back.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .pytorch_attention import Attended, attention_backward, attention_forward
from .triton_attention import attention_scratch, launch_attention_backward, launch_attention_forward
from .triton_drop_path import scale_samples
from .triton_launch import launch, planned
from .triton_math import tl, triton
from .triton_norm import launch_norm_backward, launch_norm_forward, row_plan
from .triton_norm_rational import (
    launch_norm_rational_backward,
    launch_norm_rational_forward,
    norm_rational_backward_plan,
)
from .triton_rational import backward_plan, rational_forward
from .triton_rational_mlp import launch_mlp_backward, linear_plan, rational_mlp_forward
from .triton_sums import COLUMNS, NUM_WARPS, TILE, column_sums, table_sums, tile_of
from .triton_tiles import NORM_BACKWARD

LINE = 256  # bytes; pieces of one allocation start as far apart, so that products take the same kernels


class Block(NamedTuple):
    """What a block's tensors do not say."""

    num_heads: int
    scale: float  # of the scores
    packed: bool  # whether our kernel does the attention; else PyTorch does
    eps1: float
    eps2: float
    dtype: torch.dtype  # of the products


class Parameters(NamedTuple):
    """A block's parameters, contiguous, on one device, of any dtype but float64.

    A block that begins behind its attention has none of the first four.
    """

    norm1_weight: Tensor | None
    norm1_bias: Tensor | None
    qkv_weight: Tensor | None
    qkv_bias: Tensor | None  # may be missing alone
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


class Head(NamedTuple):
    """What backward needs of norm1 and attention."""

    x: Tensor
    normed: Tensor  # in the products' dtype, as qkv and its weight
    qkv: Tensor
    mean: Tensor  # float32, as the next one
    rstd: Tensor
    lse: Tensor | None  # this and the next two: `Attended`; our kernel has the first alone
    seed: Tensor | None
    offset: Tensor | None
    qkv_weight: Tensor
    norm_weight: Tensor


class Tail(NamedTuple):
    """What backward needs of the rest."""

    total: Tensor  # in x's dtype
    mixed: Tensor  # in the products' dtype, as all but the statistics and parameters
    act: Tensor
    product: Tensor
    mean: Tensor  # float32, as the next one
    rstd: Tensor
    proj_weight: Tensor
    fc1_weight: Tensor
    fc2_weight: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    numerator1: Tensor
    denominator1: Tensor
    numerator2: Tensor
    denominator2: Tensor
    factors: Tensor | None  # (2, batch) float32, of both branches; None: they are added as they are


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


def block_forward(
    x: Tensor,
    mixed: Tensor | None,
    factors: Tensor | None,
    parameters: Parameters,
    block: Block,
    keep: bool,
) -> tuple[Tensor, Head | None, Tail | None]:
    """Compute a block.

    Args:
        x: the residual stream `(batch, num_tokens, hidden_size)`, contiguous, and not empty.
        mixed: what the heads made of norm1's tokens, like x, in the products' dtype; None: that is still to
            do, and the products are in half precision.
        factors: `(2, batch)` float32: by what the two branches of each sample are multiplied; None: they are
            added as they are.
        parameters: of the block.
        block: what else there is to know.
        keep: whether backward is to come.

    Returns:
        The block's output, and with `keep` what backward needs; no `Head` where `mixed` is given.
    """
    p, rows, hidden_size = parameters, x.shape[0] * x.shape[1], x.shape[2]
    weights = p.qkv_weight, p.proj_weight, p.fc1_weight, p.fc2_weight
    biases = p.qkv_bias, p.proj_bias, p.fc1_bias, p.fc2_bias
    qkv_weight, proj_weight, fc1_weight, fc2_weight, *biases = cast((*weights, *biases), block.dtype)
    scores = rows * block.num_heads if block.packed else 0
    statistics = pieces(x, torch.float32, (rows, rows, rows, rows, scores))
    mean1, rstd1, mean2, rstd2, lse = statistics
    head = None
    if mixed is None:
        normed = torch.empty_like(x, dtype=block.dtype)
        launch_norm_forward(x, p.norm1_weight, p.norm1_bias, normed, mean1, rstd1, eps=block.eps1)
        qkv = linear(normed, qkv_weight, biases[0])
        if block.packed:
            mixed, attended = torch.empty_like(normed), Attended(lse.view(x.shape[0], -1, x.shape[1]))
            launch_attention_forward(qkv, mixed, attended.lse, block.scale)
        else:
            mixed, attended = attention_forward(qkv, block.num_heads, block.scale)
        if keep:
            head = Head(x, normed, qkv, mean1, rstd1, *attended, qkv_weight, p.norm1_weight)
        del normed, qkv
    branch = linear(mixed, proj_weight, biases[1])
    total, act = torch.empty_like(x), torch.empty_like(x, dtype=block.dtype)
    norm = p.norm2_weight, p.norm2_bias
    table1, table2 = (p.numerator1, p.denominator1), (p.numerator2, p.denominator2)
    tensors = x, branch, *norm, *table1, total, act, mean2, rstd2
    launch_norm_rational_forward(*tensors, eps=block.eps2, factors=factors)
    del branch, tensors
    table_rows = table2[0].shape[0], table2[1].shape[0]
    if block.dtype.itemsize == 2 and linear_plan(rows, hidden_size, p.fc1_weight.shape[0], *table_rows):
        hidden, product = rational_mlp_forward(act, fc1_weight, p.fc1_bias, *table2, keep)
    else:
        product = linear(act, fc1_weight, biases[2])
        hidden = rational_forward(product, *table2)
    branch = linear(hidden, fc2_weight, biases[3])
    y = total + branch if factors is None else scale_samples(branch, factors, total)
    if not keep:
        return y, None, None
    weights = proj_weight, fc1_weight, fc2_weight
    tensors = total, mixed, act, product, mean2, rstd2, *weights, *norm, *table1, *table2
    return y, head, Tail(*tensors, factors)


def block_backward(
    grad: Tensor,
    head: Head | None,
    tail: Tail,
    block: Block,
    dtypes: Sequence[torch.dtype | None],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Compute a block's gradients.

    Args:
        grad: of the block's output, contiguous.
        head: from `block_forward`.
        tail: likewise.
        block: as there.
        dtypes: of the parameters; None for one that there is not.
        wanted: which parameters need a gradient; a weight that does not gets none.

    Returns:
        The gradient of x, that of `mixed` where it was given, and those of `Parameters`.
    """
    hidden_size, inner_size = tail.act.shape[-1], tail.product.shape[-1]
    tables = tail.numerator1, tail.denominator1, tail.numerator2, tail.denominator2
    mlp_plan = backward_plan(tail.product, *tables[2:])
    norm2_plan = norm_rational_backward_plan(tail.total, *tables[:2], totals=True)
    norm1_plan, head_sizes = None, (0, 0, 0, 0, 0)
    if head is not None:
        norm1_plan = row_plan(head.x, hidden_size, NORM_BACKWARD)
        norm1_rows = norm1_plan[0].num_programs * norm1_plan[0].rows
        batch, num_tokens, _ = head.x.shape
        attention_sizes = 1, 0, 0, 3 * hidden_size
        if block.packed:
            attention_sizes = attention_scratch(batch, block.num_heads, num_tokens, hidden_size)
        head_sizes = norm1_rows, *attention_sizes
    plan = gather_plan(
        *(hidden_size, inner_size, mlp_plan[2], mlp_plan[1][1]),
        *(norm2_plan[0].num_programs * norm2_plan[0].rows, norm2_plan[1][1], *head_sizes),
        *[table.shape[0] for table in tables],
    )
    scratch = tail.total.new_empty(plan.scratch.size, dtype=torch.float32)
    partial1, partial2, columns2, columns_fc1, *of_head = plan.scratch.cut(scratch)
    sums_of_tail = (partial1, columns2), (partial2, columns_fc1)
    plans = norm2_plan, mlp_plan
    grad, grad_mixed, *products = tail_backward(grad, tail, block.dtype, wanted, plans, sums_of_tail)
    if head is None:
        grad_mixed, products = grad_mixed.view_as(tail.mixed), [None, *products]
    else:
        grad, product = head_backward(grad, grad_mixed, head, tail.mixed, block, wanted, norm1_plan, of_head)
        grad_mixed, products = None, [product, *products]
    sums = tail.total.new_empty(plan.sums.size, dtype=torch.float32)
    tensors = scratch, tail.denominator1, tail.denominator2, sums
    launch(gather_block_sums_kernel, (plan.programs, 1, 1), tensors, plan.numbers, plan.constants, NUM_WARPS)
    grads = plan.sums.cut(sums)
    numerator1, denominator1, numerator2, denominator2 = map(Tensor.view_as, grads[:4], tables)
    norm2_weight, norm2_bias, proj_bias, fc2_bias, fc1_bias, *of_head = grads[4:]
    qkv_bias, *norm1 = of_head or (None, None, None)
    qkv_weight, proj_weight, fc1_weight, fc2_weight = cast(products, dtypes[14])
    gradients = Parameters(
        *(*norm1, qkv_weight, qkv_bias, proj_weight, proj_bias, norm2_weight, norm2_bias),
        *(numerator1, denominator1, fc1_weight, fc1_bias, numerator2, denominator2, fc2_weight, fc2_bias),
    )
    return (
        grad,
        grad_mixed,
        [
            None if dtype is None else grad if grad is None or grad.dtype == dtype else grad.to(dtype)
            for grad, dtype in zip(gradients, dtypes, strict=True)
        ],
    )


def tail_backward(
    grad: Tensor, tail: Tail, dtype: torch.dtype, wanted: Sequence[bool], plans: tuple, sums: tuple
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of `total`, of `mixed`, and of the weights of proj, fc1 and fc2."""
    t, rows, hidden_size = tail, grad.shape[0] * grad.shape[1], grad.shape[2]
    branch = grad.to(dtype) if t.factors is None else scale_samples(grad, t.factors, dtype=dtype)
    grad_rows = branch.view(rows, hidden_size)
    act, mixed = t.act.view(rows, hidden_size), t.mixed.view(rows, hidden_size)
    grad_hidden = grad_rows.mm(t.fc2_weight)
    grad_product, hidden = torch.empty_like(grad_hidden), torch.empty_like(grad_hidden)
    table1, table2 = (t.numerator1, t.denominator1), (t.numerator2, t.denominator2)
    launch_mlp_backward(grad_hidden, t.product, *table2, grad_product, hidden, *sums[1], plan=plans[1])
    del grad_hidden
    fc2_weight = grad_rows.t().mm(hidden) if wanted[14] else None
    del hidden
    fc1_weight = grad_product.t().mm(act) if wanted[10] else None
    grad_act, grad_total = grad_product.mm(t.fc1_weight), torch.empty_like(t.total)
    del grad_product
    norm = t.mean, t.rstd, t.norm_weight, t.norm_bias
    inputs = grad, grad_act, t.total, *norm, *table1
    scaled = None if t.factors is None else (t.factors, torch.empty_like(grad_total, dtype=dtype))
    launch_norm_rational_backward(*inputs, grad_total, *sums[0], plan=plans[0], totals=True, scaled=scaled)
    branch = grad_total.to(dtype) if scaled is None else scaled[1]
    grad_rows = branch.view(rows, hidden_size)
    proj_weight = grad_rows.t().mm(mixed) if wanted[4] else None
    return grad_total, grad_rows.mm(t.proj_weight), proj_weight, fc1_weight, fc2_weight


def head_backward(
    grad: Tensor,
    grad_mixed: Tensor,
    head: Head,
    mixed: Tensor,
    block: Block,
    wanted: Sequence[bool],
    norm_plan: tuple,
    sums: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Write x's gradient over that of `total`, and return it and the gradient of qkv's weight."""
    rows, hidden_size = grad_mixed.shape
    columns_qkv, columns_norm, *scratch = sums
    if block.packed:
        grad_qkv = torch.empty_like(head.qkv)
        tensors = grad_mixed, head.qkv, mixed, head.lse, grad_qkv, *scratch, columns_qkv
        launch_attention_backward(*tensors, scale=block.scale)
        grad_qkv = grad_qkv.view(rows, 3 * hidden_size)
    else:
        attended = Attended(head.lse, head.seed, head.offset)
        inputs = grad_mixed, head.qkv, mixed, attended, block.num_heads, block.scale
        grad_qkv = attention_backward(*inputs).view(rows, 3 * hidden_size)
        torch.sum(grad_qkv, 0, dtype=torch.float32, out=columns_qkv)
    weight = grad_qkv.t().mm(head.normed.view(rows, hidden_size)) if wanted[2] else None
    inputs = grad, grad_qkv.mm(head.qkv_weight), head.x, head.mean, head.rstd, head.norm_weight
    launch_norm_backward(*inputs, grad, columns_norm, plan=norm_plan)  # a row is read before it is written
    return grad, weight


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
    layout = in_lines(dtype.itemsize, *sizes)
    return layout.cut(like.new_empty(layout.size, dtype=dtype))


class Layout(NamedTuple):
    """Sizes of the pieces of a flat tensor, and of the gaps behind them."""

    size: int  # of the whole tensor
    splits: list[int]  # of pieces and gaps in order; a gap of size 0 is left out, since a view takes time
    places: list[int]  # indices of the pieces in `splits`

    def cut(self, flat: Tensor) -> list[Tensor]:
        """Return the pieces of a flat tensor, as views."""
        views = flat.split_with_sizes(self.splits)
        return [views[place] for place in self.places]


def laid_out(sizes_and_gaps: Iterable[tuple[int, int]]) -> Layout:
    """Return the layout of pieces, each given by its size and the size of the gap behind it."""
    splits: list[int] = []
    places: list[int] = []
    for size, gap in sizes_and_gaps:
        places.append(len(splits))
        splits += [size, gap] if gap else [size]
    return Layout(sum(splits), splits, places)


@planned
def in_lines(element_bytes: int, *sizes: int) -> Layout:
    """Return the layout of pieces of these sizes, each at a multiple of LINE bytes."""
    line = LINE // element_bytes
    return laid_out((size, -size % line) for size in sizes)


class GatherPlan(NamedTuple):
    scratch: Layout  # both partial sums, four sets of columns, the attention's two
    sums: Layout  # gradients: four tables, five columns, and three of the head
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
    column_sizes = [count * rows * width for count, rows, width in sets]
    scratch = in_lines(4, *partials, *column_sizes, statistics, rests)
    offsets = [sum(scratch.splits[:place]) for place in scratch.places]
    tables: list[int] = []  # the kernel's numbers
    sums: list[tuple[int, int]] = []  # sizes and gaps
    place = 0  # of the next of them
    for offset, rows, segments, rows_a, rows_b in (
        (offsets[0], norm2_rows, norm2_segments, rows_a1, rows_b1),
        (offsets[1], mlp_rows, mlp_segments, rows_a2, rows_b2),
    ):
        tables += offset, rows, segments, rows_a, rows_b, place
        size = 6 * rows_a + 4 * rows_b
        sums += (6 * rows_a, 0), (4 * rows_b, -size % COLUMNS)
        place += size + -size % COLUMNS
    columns: list[int] = []  # likewise
    first = 20
    for (count, rows, width), offset in zip(sets, offsets[2:6], strict=True):
        columns += offset, rows, width, first, place
        if rows:  # else the set has neither programs nor sums
            sums += [(width, -width % COLUMNS)] * count
            blocks = count * triton.cdiv(width, COLUMNS)
            first += blocks
            place += blocks * COLUMNS
    constants = *tile_of(norm2_segments), *tile_of(mlp_segments), TILE // COLUMNS, COLUMNS
    return GatherPlan(scratch, laid_out(sums), (*tables, *columns), constants, programs=first)
