"""Triton kernels of residual addition, layer norm and group rational in one pass, forward and backward.

The addition and the rational can be left out: then they are the layer norm of a residual stream, whose
backward also joins the stream's two gradients.

A program takes a row of `hidden_size` channels at a time, or ROWS short ones, and walks over the tensor. Each
thread keeps a segment of PARTS * WIDTH channels of one group, padded to a power of two of segments a row, so
its weights, coefficients and sums stay in registers, and a row of up to 384 channels is reduced inside one
warp.
"""

import torch
from torch import Tensor

try:  # transformers takes what checkpoint code imports elsewhere for a requirement
    import triton
    import triton.language as tl
except ImportError:
    raise

from .triton_math import (
    add_coefficient_terms,
    load_denominator,
    load_numerator,
    no_sums,
    quotient,
    quotient_and_slope,
    store_sums,
)
from .triton_rational import num_multiprocessors, traceable
from .triton_sums import gather_sums
from .triton_tiles import NORM_BACKWARD, NORM_BACKWARD_TOTALS, NORM_FORWARD, NormTile, norm_tile

NORM_SIZES = (
    "num_rows",
    "segments_per_row",
    "segments_per_group",
    "numerator_stride",
    "denominator_stride",
    "eps",
)


@triton.jit
def load_parts(ptr, mask, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Segments in float32: PARTS tensors of ptr's shape."""
    parts = ()
    for part in tl.static_range(PARTS):
        parts = parts + (tl.load(ptr + part * WIDTH, mask=mask, other=0.0).to(tl.float32),)
    return parts


@triton.jit
def row_mean(x, hidden_size, ROWS: tl.constexpr, SEGMENTS: tl.constexpr):
    """Of each row, for its segments: `(ROWS * SEGMENTS, 1)`, or a number where there is one row."""
    if ROWS == 1:
        return tl.sum(x) / hidden_size
    else:
        along = tl.sum(tl.sum(x, 1).reshape(ROWS, SEGMENTS), 1, keep_dims=True) / hidden_size
        return tl.broadcast_to(along, [ROWS, SEGMENTS]).reshape(ROWS * SEGMENTS, 1)


@triton.jit
def no_parts(PARTS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Zeros, to add up parts."""
    parts = ()
    for _ in tl.static_range(PARTS):
        parts = parts + (tl.zeros([LANES, WIDTH], tl.float32),)
    return parts


@triton.jit(do_not_specialize=NORM_SIZES)
def norm_forward_kernel(
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
    num_rows: tl.int64,
    segments_per_row: tl.int32,
    segments_per_group: tl.int32,
    numerator_stride: tl.int32,
    denominator_stride: tl.int32,
    eps: tl.float32,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    RATIONAL: tl.constexpr,
):
    """Total = residual + branch, rounded to its dtype.

    Y = rational(layer norm of total), and the norm's statistics.

    Without ADD total is residual, and neither branch nor total is touched; without RATIONAL y is the norm.
    Grid (num_programs,). Memory: two reads and two writes of each element, one and one without ADD.
    """
    LANES: tl.constexpr = ROWS * SEGMENTS
    lane = tl.arange(0, LANES)[:, None]
    segment = lane % SEGMENTS
    column = segment * (PARTS * WIDTH) + tl.arange(0, WIDTH)[None, :]
    in_row = segment < segments_per_row
    hidden_size = segments_per_row * (PARTS * WIDTH)
    eps = tl.cast(eps, tl.float32)  # torch.compile passes float64
    if RATIONAL:
        group = tl.where(in_row, segment // segments_per_group, 0)
        a = load_numerator(numerator_ptr + group * numerator_stride)
        b = load_denominator(denominator_ptr + group * denominator_stride)
    weight = load_parts(weight_ptr + column, in_row, PARTS, WIDTH)
    bias = load_parts(bias_ptr + column, in_row, PARTS, WIDTH)
    for first in range(tl.program_id(0).to(tl.int64) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row, mask = first, in_row
        if ROWS > 1:
            row = first + lane // SEGMENTS
            mask = in_row & (row < num_rows)
        offset = row * hidden_size + column
        x = load_parts(residual_ptr + offset, mask, PARTS, WIDTH)
        if ADD:
            branch = load_parts(branch_ptr + offset, mask, PARTS, WIDTH)
            totals = ()
            for part in tl.static_range(PARTS):
                total = (x[part] + branch[part]).to(total_ptr.dtype.element_ty)
                tl.store(total_ptr + offset + part * WIDTH, total, mask=mask)
                totals = totals + (total.to(tl.float32),)
            x = totals
        along = tl.zeros([LANES, WIDTH], tl.float32)
        for part in tl.static_range(PARTS):
            along += x[part]
        mean = row_mean(along, hidden_size, ROWS, SEGMENTS)
        along = tl.zeros([LANES, WIDTH], tl.float32)
        for part in tl.static_range(PARTS):
            centred = tl.where(in_row, x[part] - mean, 0.0)
            along += centred * centred
        rstd = 1.0 / tl.sqrt(row_mean(along, hidden_size, ROWS, SEGMENTS) + eps)
        for part in tl.static_range(PARTS):
            y = (x[part] - mean) * rstd * weight[part] + bias[part]
            if RATIONAL:
                y = quotient(y, a, b)
            tl.store(y_ptr + offset + part * WIDTH, y.to(y_ptr.dtype.element_ty), mask=mask)
        if ROWS == 1:
            tl.store(mean_ptr + row, mean)
            tl.store(rstd_ptr + row, rstd)
        else:
            tl.store(mean_ptr + row, mean, mask=mask & (segment == 0))
            tl.store(rstd_ptr + row, rstd, mask=mask & (segment == 0))


@triton.jit(do_not_specialize=NORM_SIZES)
def norm_backward_kernel(
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
    partial_ptr,  # (10, num_programs * ROWS, segments_per_row) float32: the sums for a_0..a_5 and |b_1|..|b_4|
    column_ptr,  # (2, num_programs * ROWS, hidden_size) float32: the sums for weight, bias; with TOTALS 4 of them
    num_rows: tl.int64,
    segments_per_row: tl.int32,
    segments_per_group: tl.int32,
    numerator_stride: tl.int32,
    denominator_stride: tl.int32,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    RATIONAL: tl.constexpr,
    TOTALS: tl.constexpr,
):
    """The gradient of total, both ways joined, and for each program its sums for the coefficients and the norm.

    With TOTALS also the sums of both ways' gradient and of grad_total: those of biases that the branch and
    whatever is added to total contain. Grid (num_programs,). Memory: three reads and one write of each
    element. Arithmetic: float32.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    LANES: tl.constexpr = ROWS * SEGMENTS
    lane = tl.arange(0, LANES)[:, None]
    segment = lane % SEGMENTS
    column = segment * (PARTS * WIDTH) + tl.arange(0, WIDTH)[None, :]
    in_row = segment < segments_per_row
    hidden_size = segments_per_row * (PARTS * WIDTH)
    weight = load_parts(weight_ptr + column, in_row, PARTS, WIDTH)
    if RATIONAL:
        group = tl.where(in_row, segment // segments_per_group, 0)
        a = load_numerator(numerator_ptr + group * numerator_stride)
        b = load_denominator(denominator_ptr + group * denominator_stride)
        bias = load_parts(bias_ptr + column, in_row, PARTS, WIDTH)
        sums = no_sums(LANES)
    weight_sum = no_parts(PARTS, LANES, WIDTH)
    bias_sum = no_parts(PARTS, LANES, WIDTH)
    grad_sum = no_parts(PARTS, LANES, WIDTH)
    grad_total_sum = no_parts(PARTS, LANES, WIDTH)
    for first in range(program.to(tl.int64) * ROWS, num_rows, programs * ROWS):
        row, mask, statistic = first, in_row, first
        if ROWS > 1:
            row = first + lane // SEGMENTS
            mask = in_row & (row < num_rows)
            statistic = tl.minimum(row, num_rows - 1)
        offset = row * hidden_size + column
        total = load_parts(total_ptr + offset, mask, PARTS, WIDTH)
        grad_y = load_parts(grad_y_ptr + offset, mask, PARTS, WIDTH)
        grad_total = load_parts(grad_total_ptr + offset, mask, PARTS, WIDTH)
        mean, rstd = tl.load(mean_ptr + statistic), tl.load(rstd_ptr + statistic)
        normals, grad_normals, weight_sums, bias_sums = (), (), (), ()
        along = tl.zeros([LANES, WIDTH], tl.float32)
        across = tl.zeros([LANES, WIDTH], tl.float32)
        for part in tl.static_range(PARTS):
            normal = (total[part] - mean) * rstd
            grad_x = grad_y[part]  # 0 outside of a row, and so is all that follows
            if RATIONAL:
                x = normal * weight[part] + bias[part]
                f, reciprocal, slope = quotient_and_slope(x, a, b)
                u = grad_x * reciprocal
                grad_x = u * slope
                sums = add_coefficient_terms(sums, x, u, f, LANES, WIDTH)
            grad_normal = grad_x * weight[part]
            along += grad_normal * normal
            across += grad_normal
            weight_sums = weight_sums + (weight_sum[part] + grad_x * normal,)
            bias_sums = bias_sums + (bias_sum[part] + grad_x,)
            normals = normals + (normal,)
            grad_normals = grad_normals + (grad_normal,)
        weight_sum, bias_sum = weight_sums, bias_sums
        slope_along = row_mean(along, hidden_size, ROWS, SEGMENTS)
        mean_grad = row_mean(across, hidden_size, ROWS, SEGMENTS)
        grad_sums, grad_total_sums = (), ()
        for part in tl.static_range(PARTS):
            grad = grad_total[part] + rstd * (grad_normals[part] - mean_grad - normals[part] * slope_along)
            tl.store(grad_ptr + offset + part * WIDTH, grad.to(grad_ptr.dtype.element_ty), mask=mask)
            if TOTALS:
                grad_sums = grad_sums + (grad_sum[part] + grad,)
                grad_total_sums = grad_total_sums + (grad_total_sum[part] + grad_total[part],)
        if TOTALS:
            grad_sum, grad_total_sum = grad_sums, grad_total_sums
    programs *= ROWS
    column_ptr += (program * ROWS + lane // SEGMENTS) * hidden_size + column
    for part in tl.static_range(PARTS):
        tl.store(column_ptr + part * WIDTH, weight_sum[part], mask=in_row)
        tl.store(column_ptr + programs * hidden_size + part * WIDTH, bias_sum[part], mask=in_row)
        if TOTALS:
            totals_ptr = column_ptr + 2 * programs * hidden_size + part * WIDTH
            tl.store(totals_ptr, grad_sum[part], mask=in_row)
            tl.store(totals_ptr + programs * hidden_size, grad_total_sum[part], mask=in_row)
    if RATIONAL:
        lane = tl.arange(0, LANES)
        segment = lane % SEGMENTS
        partial_ptr += (program * ROWS + lane // SEGMENTS) * segments_per_row + segment
        store_sums(partial_ptr, programs * segments_per_row, sums, segment < segments_per_row)


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
    kernel = traceable(norm_forward_kernel)
    return _forward(kernel, residual, branch, weight, bias, (numerator, denominator), eps, branch.dtype)


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel as a layer norm alone; the norm in `dtype`, and each row's statistics."""
    return _forward(norm_forward_kernel, x, None, weight, bias, None, eps, dtype)[1:]


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
    tables = numerator, denominator
    grad, (*grad_tables, columns) = _backward(
        grad_total, grad_y, total, mean, rstd, weight, bias, tables, totals=totals
    )
    return grad, columns, *grad_tables


def norm_backward(
    grad_total: Tensor,
    grad_y: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel as a layer norm's, whose input has another gradient, `grad_total`, beside.

    Returns:
        Both ways' gradient of total, like total, and those of weight and bias.
    """
    grad, (columns,) = _backward(grad_total, grad_y, total, mean, rstd, weight, bias, None, totals=False)
    return grad, columns[0].to(weight.dtype), columns[1].to(bias.dtype)


def _forward(
    kernel, residual, branch, weight, bias, tables, eps, dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = residual if branch is None else torch.empty_like(residual)
    y = torch.empty_like(residual, dtype=dtype)
    mean, rstd = (residual.new_empty(residual.shape[:-1], dtype=torch.float32) for _ in range(2))
    tile, layout = _plan(residual, tables, NORM_FORWARD)
    if residual.numel():
        with torch.accelerator.device_index(residual.device.index):  # pyright: ignore[reportArgumentType]
            kernel[(tile.num_programs,)](
                residual,
                residual if branch is None else branch,
                weight,
                bias,
                *(tables or (weight, bias)),  # not read without tables
                total,
                y,
                mean,
                rstd,
                *layout,
                eps,
                tile.rows,
                tile.segments,
                tile.parts,
                tile.width,
                branch is not None,
                tables is not None,
                num_warps=tile.num_warps,
            )
    return total, y, mean, rstd


def _backward(
    grad_total, grad_y, total, mean, rstd, weight, bias, tables, totals
) -> tuple[Tensor, tuple[Tensor, ...]]:
    grad, hidden_size = torch.empty_like(total), total.shape[-1]
    tile, layout = _plan(total, tables, NORM_BACKWARD_TOTALS if totals else NORM_BACKWARD)
    partial = None
    if tables is not None:
        segments_per_row = hidden_size // (tile.parts * tile.width)
        partial = total.new_empty(10, tile.num_programs * tile.rows, segments_per_row, dtype=torch.float32)
    columns = total.new_empty(
        4 if totals else 2, tile.num_programs * tile.rows, hidden_size, dtype=torch.float32
    )
    if total.numel():
        with torch.accelerator.device_index(total.device.index):  # pyright: ignore[reportArgumentType]
            norm_backward_kernel[(tile.num_programs,)](
                grad_total,
                grad_y,
                total,
                mean,
                rstd,
                weight,
                bias,
                *(tables or (weight, bias)),  # not read without tables
                grad,
                columns if partial is None else partial,
                columns,
                *layout,
                tile.rows,
                tile.segments,
                tile.parts,
                tile.width,
                tables is not None,
                totals,
                num_warps=tile.num_warps,
            )
    return grad, gather_sums(tables, partial, columns)


def _plan(
    total: Tensor, tables: tuple[Tensor, Tensor] | None, registers: tuple[float, float]
) -> tuple[NormTile, tuple[int, ...]]:
    """Tile, and the kernels' arguments from num_rows to denominator_stride."""
    hidden_size = total.shape[-1]
    rows = (1, 1) if tables is None else tuple(table.shape[0] for table in tables)
    num_rows = total.numel() // hidden_size
    multiprocessors = num_multiprocessors(total.device)
    tile = norm_tile(num_rows, hidden_size, hidden_size // max(rows), multiprocessors, registers)
    segments_per_row = hidden_size // (tile.parts * tile.width)
    return tile, (
        num_rows,
        segments_per_row,
        segments_per_row // max(rows),
        0 if rows[0] == 1 else 6,
        0 if rows[1] == 1 else 4,
    )
