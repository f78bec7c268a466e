"""Triton kernels of an MLP's two linear maps with the rational between them, forward and backward.

Forward applies the rational to the first map's product while that is in registers: it costs no read of
memory, and without a backward pass to come the product itself is not written. Backward stands between the
maps' own gradients: it writes what both need besides its input's gradient: y again, so that forward need not
keep it, and the column sums of that gradient, which are those of the first map's bias.
"""

import torch
from torch import Tensor

from .triton_launch import launch, planned
from .triton_math import (
    add_coefficient_terms,
    load_denominator,
    load_numerator,
    no_sums,
    quotient,
    quotient_and_slope,
    store_sums,
    tl,
    triton,
)
from .triton_rational import LAYOUT, backward_plan
from .triton_sums import gather_sums
from .triton_tiles import Tile, linear_tile


@triton.jit
def column_chunks(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """Return a tile (ROWS, COLUMNS) as tiles (ROWS, CHUNK), left to right; values stay in their threads."""
    if COLUMNS == CHUNK:
        return (x,)
    else:
        left, right = tl.split(x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))
        return column_chunks(left, ROWS, COLUMNS // 2, CHUNK) + column_chunks(
            right, ROWS, COLUMNS // 2, CHUNK
        )


@triton.jit(do_not_specialize=("num_rows", "numerator_stride", "denominator_stride"))
def rational_mlp_forward_kernel(
    x_ptr,  # (num_rows, IN_FEATURES), contiguous, bfloat16 or float16
    matrix_ptr,  # (OUT_FEATURES, IN_FEATURES), likewise
    bias_ptr,  # (OUT_FEATURES,), any float
    numerator_ptr,  # (1 or num_groups, 6), any float; numerator_stride is 0 when one row serves all groups
    denominator_ptr,  # (1 or num_groups, 4), likewise
    product_ptr,  # (num_rows, OUT_FEATURES), like x: x matrix^T + bias; untouched without KEEP
    y_ptr,  # like product: the rational of it, as rounded
    num_rows: tl.int64,
    numerator_stride: tl.int32,
    denominator_stride: tl.int32,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Compute y = rational(x matrix^T + bias) for ROWS rows and COLUMNS features.

    Grid (row blocks * column blocks,), neighbours share the rows. CHUNK divides COLUMNS and GROUP_SIZE, so a
    chunk of columns has one rational; COLUMNS divides OUT_FEATURES and STEP IN_FEATURES. Products in the
    input's dtype with float32 sums. Rows beyond the last read the last one again and are not stored. With
    KEEP the product is stored, too: that one store is all that a kernel of its own would leave out.
    """
    column_blocks: tl.constexpr = OUT_FEATURES // COLUMNS
    first_column = tl.program_id(0) % column_blocks * COLUMNS
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    feature = tl.arange(0, STEP)
    x_ptr += tl.minimum(row, num_rows - 1)[:, None] * IN_FEATURES + feature[None, :]
    matrix_ptr += column[:, None] * IN_FEATURES + feature[None, :]
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, IN_FEATURES, STEP, num_stages=STAGES):
        x, matrix = tl.load(x_ptr + first), tl.load(matrix_ptr + first)
        product = tl.dot(x, tl.trans(matrix), product)
    product = (product + tl.load(bias_ptr + column).to(tl.float32)[None, :]).to(y_ptr.dtype.element_ty)
    chunks = column_chunks(product, ROWS, COLUMNS, CHUNK)
    offset = row[:, None] * OUT_FEATURES + first_column + tl.arange(0, CHUNK)[None, :]
    mask = (row < num_rows)[:, None]
    for i in tl.static_range(COLUMNS // CHUNK):
        group = (first_column + i * CHUNK) // GROUP_SIZE
        a = load_numerator(numerator_ptr + group * numerator_stride)
        b = load_denominator(denominator_ptr + group * denominator_stride)
        y = quotient(chunks[i].to(tl.float32), a, b)
        if KEEP:
            tl.store(product_ptr + offset + i * CHUNK, chunks[i], mask=mask)
        tl.store(y_ptr + offset + i * CHUNK, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=LAYOUT)
def rational_mlp_backward_kernel(
    grad_y_ptr,  # (num_segments * WIDTH,), contiguous, any float
    x_ptr,  # like grad_y
    numerator_ptr,  # (1 or num_groups, 6), any float; numerator_stride is 0 when one row serves all groups
    denominator_ptr,  # (1 or num_groups, 4), likewise
    grad_x_ptr,  # like x
    y_ptr,  # like x
    partial_ptr,  # (10, num_programs, SEGMENTS) float32: the sums for a_0..a_5 and |b_1|..|b_4|
    column_ptr,  # (num_programs, SEGMENTS, WIDTH) float32: sums of grad_x
    num_segments: tl.int64,
    segments_per_row: tl.int32,
    segments_per_group: tl.int32,
    numerator_stride: tl.int32,
    denominator_stride: tl.int32,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute grad_x, y, and for each program its sums for coefficients and columns.

    Grid (num_programs,), with num_programs * SEGMENTS a multiple of segments_per_row, as in
    `rational_backward_kernel`. Memory: two reads and two writes of each element. Arithmetic: float32, about
    50 instructions an element.
    """
    first = tl.program_id(0).to(tl.int64) * SEGMENTS
    step = tl.num_programs(0).to(tl.int64) * SEGMENTS
    segment = tl.arange(0, SEGMENTS)
    offset = segment[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    group = (
        ((first % segments_per_row).to(tl.int32) + segment[:, None]) % segments_per_row // segments_per_group
    )
    a = load_numerator(numerator_ptr + group * numerator_stride)
    b = load_denominator(denominator_ptr + group * denominator_stride)
    sums = no_sums(SEGMENTS)
    columns = tl.zeros([SEGMENTS, WIDTH], tl.float32)
    for start in tl.range(first, num_segments, step, num_stages=3):
        mask = (segment < num_segments - start)[:, None]
        x = tl.load(x_ptr + start * WIDTH + offset, mask=mask, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + start * WIDTH + offset, mask=mask, other=0.0).to(tl.float32)
        f, reciprocal, slope = quotient_and_slope(x, a, b)
        u = grad_y * reciprocal
        grad_x = u * slope
        y, stored = f.to(y_ptr.dtype.element_ty), grad_x.to(grad_x_ptr.dtype.element_ty)
        tl.store(y_ptr + start * WIDTH + offset, y, mask=mask, cache_modifier=".cs")
        tl.store(grad_x_ptr + start * WIDTH + offset, stored, mask=mask, cache_modifier=".cs")
        sums = add_coefficient_terms(sums, x, u, f, SEGMENTS, WIDTH)
        columns += grad_x
    store_sums(partial_ptr + first + segment, step, sums, None)
    tl.store(column_ptr + first * WIDTH + offset, columns)


def rational_mlp_forward(
    x: Tensor, weight: Tensor, bias: Tensor, numerator: Tensor, denominator: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments are valid and contiguous, and `linear_tile` has a tile for them.

    Returns:
        y `(..., out_features)` in x's dtype, and like it the product that it is the rational of; empty
        without `keep`.
    """
    (out_features, in_features), num_rows = weight.shape, x.numel() // x.shape[-1]
    rows = numerator.shape[0], denominator.shape[0]
    plan = linear_plan(num_rows, in_features, out_features, *rows)
    assert plan
    programs, numbers, constants, num_warps = plan
    y = x.new_empty(*x.shape[:-1], out_features)
    product = torch.empty_like(y) if keep else y.new_empty(0)
    if num_rows:
        tensors = x, weight, bias, numerator, denominator, product, y
        constants = *constants, keep
        launch(rational_mlp_forward_kernel, (programs, 1, 1), tensors, numbers, constants, num_warps)
    return y, product


def rational_mlp_backward(
    grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel and add up its sums in a fixed order; arguments are valid and contiguous.

    Returns:
        grad_x and y like x, the column sums of grad_x `(hidden_size,)` in float32, and both tables'
        gradients.
    """
    grad_x, y = torch.empty_like(x), torch.empty_like(x)
    plan = backward_plan(x, numerator, denominator)
    _, layout, rows = plan
    partial = torch.empty(10, rows, layout[1], dtype=torch.float32, device=x.device)
    columns = torch.empty(1, rows, x.shape[-1], dtype=torch.float32, device=x.device)
    launch_mlp_backward(grad_y, x, numerator, denominator, grad_x, y, partial, columns, plan=plan)
    *tables, columns = gather_sums((numerator, denominator), partial, columns)
    return grad_x, y, columns.squeeze(0), *tables


def launch_mlp_backward(*tensors: Tensor, plan: tuple[Tile, tuple[int, ...], int]) -> None:
    """Launch the backward kernel on its tensors, if they have elements."""
    tile, layout, _ = plan
    if tensors[0].numel():
        grid, constants = (tile.num_programs, 1, 1), (tile.segments, tile.width)
        launch(rational_mlp_backward_kernel, grid, tensors, layout, constants, tile.num_warps)


@planned
def linear_plan(
    num_rows: int, in_features: int, out_features: int, numerator_rows: int, denominator_rows: int
) -> tuple[int, tuple[int, ...], tuple[int, ...], int] | None:
    """Return the forward kernel's programs, numbers, constants but for KEEP, and warps.

    None where cuBLAS does better.
    """
    group_size = out_features // max(numerator_rows, denominator_rows)
    tile = linear_tile(in_features, out_features, group_size)
    if tile is None:
        return None
    return (
        triton.cdiv(num_rows, tile.rows) * (out_features // tile.columns),
        (num_rows, 0 if numerator_rows == 1 else 6, 0 if denominator_rows == 1 else 4),
        (in_features, out_features, group_size, tile.rows, tile.columns, tile.step, tile.chunk, tile.stages),
        tile.num_warps,
    )
