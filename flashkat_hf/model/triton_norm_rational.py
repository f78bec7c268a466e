"""Triton kernels of residual addition, layer norm and group rational in one pass, forward and backward.

They see rows as the kernels of `triton_norm.py` do; a thread's segment lies in one group, so its coefficients
and their sums stay in registers, too.
"""

import torch
from torch import Tensor

from .triton_launch import launch
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
from .triton_norm import (
    load_of_sample,
    load_parts,
    load_statistics,
    no_parts,
    row_layout,
    row_mean,
    row_plan,
    row_statistics,
    rows_from,
    store_columns,
    store_statistics,
)
from .triton_rational import LAYOUT
from .triton_sums import gather_sums
from .triton_tiles import NORM_BACKWARD_TOTALS, NORM_FORWARD, NORM_RATIONAL_BACKWARD, NormTile

UNSPECIALIZED = ("num_rows", *LAYOUT[1:], "rows_per_sample", "eps")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def add_norm_rational_forward_kernel(
    residual_ptr,  # (num_rows, hidden_size), contiguous, any float
    branch_ptr,  # (num_rows, hidden_size), contiguous, any float
    weight_ptr,  # (hidden_size,), any float
    bias_ptr,  # (hidden_size,), any float
    numerator_ptr,  # (1 or num_groups, 6), any float; numerator_stride is 0 when one row serves all groups
    denominator_ptr,  # (1 or num_groups, 4), likewise
    total_ptr,  # like residual
    y_ptr,  # (num_rows, hidden_size), any float
    mean_ptr,  # (num_rows,) float32
    rstd_ptr,  # (num_rows,) float32
    factor_ptr,  # (2, num_rows / rows_per_sample) float32; any tensor where not SCALED
    num_rows: tl.int64,
    segments_per_row: tl.int32,
    segments_per_group: tl.int32,
    numerator_stride: tl.int32,
    denominator_stride: tl.int32,
    rows_per_sample: tl.int32,
    eps: tl.float32,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Compute total = residual + branch, rounded to its dtype; y = rational(layer norm of total).

    The norm's statistics are stored, too. With SCALED the branch is multiplied by its sample's factor in the
    first row.

    Grid (num_programs,). Memory: two reads and two writes of each element. Arithmetic: float32.
    """
    lane, segment, column = row_layout(ROWS, SEGMENTS, PARTS, WIDTH)
    in_row = segment < segments_per_row
    hidden_size = segments_per_row * (PARTS * WIDTH)
    eps = tl.cast(eps, tl.float32)  # float64 when compiled: docs/notes/float64-arguments.md
    group = tl.where(in_row, segment // segments_per_group, 0)
    a = load_numerator(numerator_ptr + group * numerator_stride)
    b = load_denominator(denominator_ptr + group * denominator_stride)
    weight = load_parts(weight_ptr + column, in_row, PARTS, WIDTH)
    bias = load_parts(bias_ptr + column, in_row, PARTS, WIDTH)
    for first in range(tl.program_id(0).to(tl.int64) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row, mask = rows_from(first, lane, in_row, num_rows, ROWS, SEGMENTS)
        offset = row * hidden_size + column
        residual = load_parts(residual_ptr + offset, mask, PARTS, WIDTH)
        branch = load_parts(branch_ptr + offset, mask, PARTS, WIDTH)
        if SCALED:
            factor = load_of_sample(factor_ptr, row, num_rows, rows_per_sample, ROWS)
        totals = ()
        for part in tl.static_range(PARTS):
            summand = branch[part]
            if SCALED:
                summand = factor * summand
            total = (residual[part] + summand).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + offset + part * WIDTH, total, mask=mask)
            totals = totals + (total.to(tl.float32),)
        mean, rstd = row_statistics(totals, in_row, hidden_size, eps, ROWS, SEGMENTS, PARTS, WIDTH)
        for part in tl.static_range(PARTS):
            y = quotient((totals[part] - mean) * rstd * weight[part] + bias[part], a, b)
            tl.store(y_ptr + offset + part * WIDTH, y.to(y_ptr.dtype.element_ty), mask=mask)
        store_statistics(mean_ptr, rstd_ptr, row, mean, rstd, mask, segment, ROWS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def add_norm_rational_backward_kernel(
    grad_total_ptr,  # (num_rows, hidden_size), contiguous, any float
    grad_y_ptr,  # (num_rows, hidden_size), contiguous, any float
    total_ptr,  # (num_rows, hidden_size), contiguous, any float
    mean_ptr,  # (num_rows,) float32
    rstd_ptr,  # (num_rows,) float32
    weight_ptr,  # (hidden_size,), any float
    bias_ptr,  # (hidden_size,), any float
    numerator_ptr,  # (1 or num_groups, 6), any float; numerator_stride is 0 when one row serves all groups
    denominator_ptr,  # (1 or num_groups, 4), likewise
    grad_ptr,  # like total: the gradient of both summands
    partial_ptr,  # (10, num_programs * ROWS, segments_per_row) float32: the sums for a_0..a_5, |b_1|..|b_4|
    column_ptr,  # (2 or 4, num_programs * ROWS, hidden_size) float32: the sums for weight, bias, totals
    factor_ptr,  # (2, num_rows / rows_per_sample) float32; any tensor where not SCALED, as the next one
    grad_branch_ptr,  # (num_rows, hidden_size), any float
    num_rows: tl.int64,
    segments_per_row: tl.int32,
    segments_per_group: tl.int32,
    numerator_stride: tl.int32,
    denominator_stride: tl.int32,
    rows_per_sample: tl.int32,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOTALS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Compute the gradient of total, both ways joined, and each program's sums for coefficients and norm.

    With TOTALS also the sums of both ways' gradient and of grad_total: those of biases that the branch and
    whatever is added to total contain. A switch and no kernel of its own: they are two sums more in the same
    registers, where a launch of their own would read both gradients again. With SCALED, which needs TOTALS,
    these sums are of the gradient times the first factor of its sample, and of grad_total times the second.
    The former product, the gradient of the branch, is written, too.

    Grid (num_programs,). Memory: three reads and one write of each element, with SCALED two writes.
    Arithmetic: float32.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    LANES: tl.constexpr = ROWS * SEGMENTS
    lane, segment, column = row_layout(ROWS, SEGMENTS, PARTS, WIDTH)
    in_row = segment < segments_per_row
    hidden_size = segments_per_row * (PARTS * WIDTH)
    group = tl.where(in_row, segment // segments_per_group, 0)
    a = load_numerator(numerator_ptr + group * numerator_stride)
    b = load_denominator(denominator_ptr + group * denominator_stride)
    weight = load_parts(weight_ptr + column, in_row, PARTS, WIDTH)
    bias = load_parts(bias_ptr + column, in_row, PARTS, WIDTH)
    sums = no_sums(LANES)
    weight_sum = no_parts(PARTS, LANES, WIDTH)
    bias_sum = no_parts(PARTS, LANES, WIDTH)
    grad_sum = no_parts(PARTS, LANES, WIDTH)
    grad_total_sum = no_parts(PARTS, LANES, WIDTH)
    for first in range(program.to(tl.int64) * ROWS, num_rows, programs * ROWS):
        row, mask = rows_from(first, lane, in_row, num_rows, ROWS, SEGMENTS)
        offset = row * hidden_size + column
        total = load_parts(total_ptr + offset, mask, PARTS, WIDTH)
        grad_y = load_parts(grad_y_ptr + offset, mask, PARTS, WIDTH)  # 0 outside of a row
        grad_total = load_parts(grad_total_ptr + offset, mask, PARTS, WIDTH)
        mean, rstd = load_statistics(mean_ptr, rstd_ptr, row, num_rows, ROWS)
        normals, grad_normals, weight_sums, bias_sums = (), (), (), ()
        products = tl.zeros([LANES, WIDTH], tl.float32)
        grads = tl.zeros([LANES, WIDTH], tl.float32)
        for part in tl.static_range(PARTS):
            normal = (total[part] - mean) * rstd
            x = normal * weight[part] + bias[part]
            f, reciprocal, slope = quotient_and_slope(x, a, b)
            u = grad_y[part] * reciprocal
            grad_x = u * slope
            sums = add_coefficient_terms(sums, x, u, f, LANES, WIDTH)
            grad_normal = grad_x * weight[part]
            products += grad_normal * normal
            grads += grad_normal
            weight_sums = weight_sums + (weight_sum[part] + grad_x * normal,)
            bias_sums = bias_sums + (bias_sum[part] + grad_x,)
            normals = normals + (normal,)
            grad_normals = grad_normals + (grad_normal,)
        weight_sum, bias_sum = weight_sums, bias_sums
        mean_product = row_mean(products, hidden_size, ROWS, SEGMENTS)
        mean_grad = row_mean(grads, hidden_size, ROWS, SEGMENTS)
        if SCALED:
            factor = load_of_sample(factor_ptr, row, num_rows, rows_per_sample, ROWS)
            later_ptr = factor_ptr + num_rows.to(tl.int32) // rows_per_sample
            later_factor = load_of_sample(later_ptr, row, num_rows, rows_per_sample, ROWS)
        grad_sums, grad_total_sums = (), ()
        for part in tl.static_range(PARTS):
            grad = grad_total[part] + rstd * (grad_normals[part] - mean_grad - normals[part] * mean_product)
            tl.store(grad_ptr + offset + part * WIDTH, grad.to(grad_ptr.dtype.element_ty), mask=mask)
            if TOTALS:
                grad_branch, grad_later = grad, grad_total[part]
                if SCALED:
                    grad_branch, grad_later = factor * grad, later_factor * grad_total[part]
                    branch = grad_branch.to(grad_branch_ptr.dtype.element_ty)
                    tl.store(grad_branch_ptr + offset + part * WIDTH, branch, mask=mask)
                grad_sums = grad_sums + (grad_sum[part] + grad_branch,)
                grad_total_sums = grad_total_sums + (grad_total_sum[part] + grad_later,)
        if TOTALS:
            grad_sum, grad_total_sum = grad_sums, grad_total_sums
    rows = programs * ROWS
    column_ptr += (program * ROWS + lane // SEGMENTS) * hidden_size + column
    store_columns(column_ptr, weight_sum, in_row, PARTS, WIDTH)
    store_columns(column_ptr + rows * hidden_size, bias_sum, in_row, PARTS, WIDTH)
    if TOTALS:
        store_columns(column_ptr + 2 * rows * hidden_size, grad_sum, in_row, PARTS, WIDTH)
        store_columns(column_ptr + 3 * rows * hidden_size, grad_total_sum, in_row, PARTS, WIDTH)
    lane = tl.arange(0, LANES)
    segment = lane % SEGMENTS
    partial_ptr += (program * ROWS + lane // SEGMENTS) * segments_per_row + segment
    store_sums(partial_ptr, rows * segments_per_row, sums, segment < segments_per_row)


def add_norm_rational_forward(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel; arguments are valid and contiguous.

    Returns:
        total like residual, y like branch, mean and reciprocal standard deviation `(...)` of each row in
        float32.
    """
    total, y = torch.empty_like(residual), torch.empty_like(residual, dtype=branch.dtype)
    mean, rstd = (residual.new_empty(residual.shape[:-1], dtype=torch.float32) for _ in range(2))
    tensors = residual, branch, weight, bias, numerator, denominator, total, y, mean, rstd
    launch_norm_rational_forward(*tensors, eps=eps)
    return total, y, mean, rstd


def launch_norm_rational_forward(*tensors: Tensor, eps: float, factors: Tensor | None = None) -> None:
    """Launch the forward kernel on its tensors, if they have elements.

    The first row of `factors` `(2, samples)` multiplies the branch; each sample has equally many of its rows.
    """
    residual, _, weight, _, numerator, denominator, *_ = tensors
    tile, numbers = row_and_table_plan(residual, numerator, denominator, NORM_FORWARD)
    if residual.numel():
        kernel, grid = add_norm_rational_forward_kernel, (tile.num_programs, 1, 1)
        rows_per_sample = 1 if factors is None else numbers[0] // factors.shape[1]
        pointers = (*tensors, weight if factors is None else factors)
        numbers, constants = (*numbers, rows_per_sample, eps), (*tile[:4], factors is not None)
        launch(kernel, grid, pointers, numbers, constants, tile.num_warps)


def add_norm_rational_backward(
    grad_total: Tensor,
    grad_y: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    totals: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernel and add up its sums in a fixed order; arguments are valid and contiguous.

    Returns:
        The gradient of both summands, like total; `(2, hidden_size)` float32, those of weight and bias, and
        with `totals` `(4, hidden_size)`, the column sums of that gradient and of `grad_total` behind them;
        and those of numerator and denominator.
    """
    grad, hidden_size = torch.empty_like(total), total.shape[-1]
    plan = norm_rational_backward_plan(total, numerator, denominator, totals)
    tile, (_, segments_per_row, *_) = plan
    rows = tile.num_programs * tile.rows
    partial = total.new_empty(10, rows, segments_per_row, dtype=torch.float32)
    columns = total.new_empty(4 if totals else 2, rows, hidden_size, dtype=torch.float32)
    tensors = grad_total, grad_y, total, mean, rstd, weight, bias, numerator, denominator
    launch_norm_rational_backward(*tensors, grad, partial, columns, plan=plan, totals=totals)
    *grad_tables, columns = gather_sums((numerator, denominator), partial, columns)
    return grad, columns, *grad_tables


def launch_norm_rational_backward(
    *tensors: Tensor,
    plan: tuple[NormTile, tuple[int, ...]],
    totals: bool,
    scaled: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Launch the backward kernel on its tensors, if they have elements.

    `scaled`, for which `totals` must be True, has the factors of both branches `(2, samples)` and the tensor
    that the gradient of the first branch is written to.
    """
    tile, numbers = plan
    grad_total, weight = tensors[0], tensors[5]
    if grad_total.numel():
        kernel, grid = add_norm_rational_backward_kernel, (tile.num_programs, 1, 1)
        rows_per_sample = 1 if scaled is None else numbers[0] // scaled[0].shape[1]
        pointers = (*tensors, *(scaled or (weight, weight)))
        numbers, constants = (*numbers, rows_per_sample), (*tile[:4], totals, scaled is not None)
        launch(kernel, grid, pointers, numbers, constants, tile.num_warps)


def norm_rational_backward_plan(
    total: Tensor, numerator: Tensor, denominator: Tensor, totals: bool
) -> tuple[NormTile, tuple[int, ...]]:
    """Return the tile and the numbers of the backward kernel."""
    registers = NORM_BACKWARD_TOTALS if totals else NORM_RATIONAL_BACKWARD
    return row_and_table_plan(total, numerator, denominator, registers)


def row_and_table_plan(
    total: Tensor, numerator: Tensor, denominator: Tensor, registers: tuple[float, float]
) -> tuple[NormTile, tuple[int, ...]]:
    """Return the tile, and the kernels' numbers from num_rows to denominator_stride."""
    rows = numerator.shape[0], denominator.shape[0]
    tile, (num_rows, segments_per_row) = row_plan(total, total.shape[-1] // max(rows), registers)
    strides = 0 if rows[0] == 1 else 6, 0 if rows[1] == 1 else 4
    return tile, (num_rows, segments_per_row, segments_per_row // max(rows), *strides)
