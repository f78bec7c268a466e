"""Triton kernels of the layer norm of a residual stream, and what every norm kernel shares.

A program takes a row of `hidden_size` channels at a time, or ROWS short ones, and walks over the tensor. Each
thread keeps a segment of PARTS * WIDTH channels of one group, padded to a power of two of segments a row, so
its weights and sums stay in registers, and a row of up to 384 channels is reduced inside one warp.
"""

import torch
from torch import Tensor

from .triton_launch import launch, planned
from .triton_math import tl, triton
from .triton_rational import num_multiprocessors
from .triton_sums import gather_sums
from .triton_tiles import NORM_BACKWARD, NORM_FORWARD, NormTile, norm_tile

UNSPECIALIZED = ("num_rows", "segments_per_row", "eps")


@triton.jit
def row_layout(ROWS: tl.constexpr, SEGMENTS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Return lanes `(ROWS * SEGMENTS, 1)`, their segments, and the columns of their first part."""
    lane = tl.arange(0, ROWS * SEGMENTS)[:, None]
    segment = lane % SEGMENTS
    return lane, segment, segment * (PARTS * WIDTH) + tl.arange(0, WIDTH)[None, :]


@triton.jit
def rows_from(first, lane, in_row, num_rows, ROWS: tl.constexpr, SEGMENTS: tl.constexpr):
    """Return the row of each lane from `first` on, and which lanes are in the tensor.

    One number where there is one row.
    """
    if ROWS == 1:
        return first, in_row
    else:
        row = first + lane // SEGMENTS
        return row, in_row & (row < num_rows)


@triton.jit
def load_parts(ptr, mask, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Load segments in float32: PARTS tensors of ptr's shape."""
    parts = ()
    for part in tl.static_range(PARTS):
        parts = parts + (tl.load(ptr + part * WIDTH, mask=mask, other=0.0).to(tl.float32),)
    return parts


@triton.jit
def no_parts(PARTS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Return zeros, to add up parts."""
    parts = ()
    for _ in tl.static_range(PARTS):
        parts = parts + (tl.zeros([LANES, WIDTH], tl.float32),)
    return parts


@triton.jit
def row_mean(x, hidden_size, ROWS: tl.constexpr, SEGMENTS: tl.constexpr):
    """Return the mean of each row for its segments, `(ROWS * SEGMENTS, 1)`, or a number for one row."""
    if ROWS == 1:
        return tl.sum(x) / hidden_size
    else:
        mean = tl.sum(tl.sum(x, 1).reshape(ROWS, SEGMENTS), 1, keep_dims=True) / hidden_size
        return tl.broadcast_to(mean, [ROWS, SEGMENTS]).reshape(ROWS * SEGMENTS, 1)


@triton.jit
def row_statistics(
    x, in_row, hidden_size, eps,
    ROWS: tl.constexpr, SEGMENTS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return mean and reciprocal standard deviation of each row of x, given in parts."""
    sums = tl.zeros([ROWS * SEGMENTS, WIDTH], tl.float32)
    for part in tl.static_range(PARTS):
        sums += x[part]
    mean = row_mean(sums, hidden_size, ROWS, SEGMENTS)
    squares = tl.zeros([ROWS * SEGMENTS, WIDTH], tl.float32)
    for part in tl.static_range(PARTS):
        centred = tl.where(in_row, x[part] - mean, 0.0)
        squares += centred * centred
    return mean, 1.0 / tl.sqrt(row_mean(squares, hidden_size, ROWS, SEGMENTS) + eps)


@triton.jit
def store_statistics(mean_ptr, rstd_ptr, row, mean, rstd, mask, segment, ROWS: tl.constexpr):
    """Store one number of each for each row."""
    if ROWS == 1:
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
    else:
        tl.store(mean_ptr + row, mean, mask=mask & (segment == 0))
        tl.store(rstd_ptr + row, rstd, mask=mask & (segment == 0))


@triton.jit
def load_statistics(mean_ptr, rstd_ptr, row, num_rows, ROWS: tl.constexpr):
    """Load mean and reciprocal standard deviation of each lane's row.

    Lanes beyond the last row read the last one's.
    """
    statistic = row if ROWS == 1 else tl.minimum(row, num_rows - 1)
    return tl.load(mean_ptr + statistic), tl.load(rstd_ptr + statistic)


@triton.jit
def load_of_sample(ptr, row, num_rows, rows_per_sample, ROWS: tl.constexpr):
    """Load, for each lane, the number of the sample that its row belongs to: `rows_per_sample` rows are one.

    Lanes beyond the last row read that of the last one.
    """
    last = row if ROWS == 1 else tl.minimum(row, num_rows - 1)
    # There are fewer rows than 2**31, and a division of int64 takes many registers.
    return tl.load(ptr + last.to(tl.int32) // rows_per_sample)


@triton.jit
def store_columns(ptr, sums, mask, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Store a program's sums over its rows, one for each column."""
    for part in tl.static_range(PARTS):
        tl.store(ptr + part * WIDTH, sums[part], mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def norm_forward_kernel(
    x_ptr,  # (num_rows, hidden_size), contiguous, any float
    weight_ptr,  # (hidden_size,), any float
    bias_ptr,  # (hidden_size,), any float
    y_ptr,  # (num_rows, hidden_size), any float
    mean_ptr,  # (num_rows,) float32
    rstd_ptr,  # (num_rows,) float32
    num_rows: tl.int64,
    segments_per_row: tl.int32,
    eps: tl.float32,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute y = layer norm of x, and its statistics.

    Grid (num_programs,). Memory: one read and one write of each element. Arithmetic: float32.
    """
    lane, segment, column = row_layout(ROWS, SEGMENTS, PARTS, WIDTH)
    in_row = segment < segments_per_row
    hidden_size = segments_per_row * (PARTS * WIDTH)
    weight = load_parts(weight_ptr + column, in_row, PARTS, WIDTH)
    bias = load_parts(bias_ptr + column, in_row, PARTS, WIDTH)
    for first in range(tl.program_id(0).to(tl.int64) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row, mask = rows_from(first, lane, in_row, num_rows, ROWS, SEGMENTS)
        offset = row * hidden_size + column
        x = load_parts(x_ptr + offset, mask, PARTS, WIDTH)
        mean, rstd = row_statistics(x, in_row, hidden_size, eps, ROWS, SEGMENTS, PARTS, WIDTH)
        for part in tl.static_range(PARTS):
            y = (x[part] - mean) * rstd * weight[part] + bias[part]
            tl.store(y_ptr + offset + part * WIDTH, y.to(y_ptr.dtype.element_ty), mask=mask)
        store_statistics(mean_ptr, rstd_ptr, row, mean, rstd, mask, segment, ROWS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def norm_backward_kernel(
    grad_x_ptr,  # (num_rows, hidden_size), contiguous, any float: the gradient that x has beside the norm's
    grad_y_ptr,  # (num_rows, hidden_size), contiguous, any float
    x_ptr,  # (num_rows, hidden_size), contiguous, any float
    mean_ptr,  # (num_rows,) float32
    rstd_ptr,  # (num_rows,) float32
    weight_ptr,  # (hidden_size,), any float
    grad_ptr,  # like x: both gradients joined
    column_ptr,  # (2, num_programs * ROWS, hidden_size) float32: the sums for weight and bias
    num_rows: tl.int64,
    segments_per_row: tl.int32,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute the gradient of x, both ways joined, and each program's sums for weight and bias.

    Grid (num_programs,). Memory: three reads and one write of each element. Arithmetic: float32.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    lane, segment, column = row_layout(ROWS, SEGMENTS, PARTS, WIDTH)
    in_row = segment < segments_per_row
    hidden_size = segments_per_row * (PARTS * WIDTH)
    weight = load_parts(weight_ptr + column, in_row, PARTS, WIDTH)
    weight_sum = no_parts(PARTS, ROWS * SEGMENTS, WIDTH)
    bias_sum = no_parts(PARTS, ROWS * SEGMENTS, WIDTH)
    for first in range(program.to(tl.int64) * ROWS, num_rows, programs * ROWS):
        row, mask = rows_from(first, lane, in_row, num_rows, ROWS, SEGMENTS)
        offset = row * hidden_size + column
        x = load_parts(x_ptr + offset, mask, PARTS, WIDTH)
        grad_y = load_parts(
            grad_y_ptr + offset, mask, PARTS, WIDTH
        )  # 0 outside of a row, and so all that follows
        grad_x = load_parts(grad_x_ptr + offset, mask, PARTS, WIDTH)
        mean, rstd = load_statistics(mean_ptr, rstd_ptr, row, num_rows, ROWS)
        normals, grad_normals, weight_sums, bias_sums = (), (), (), ()
        products = tl.zeros([ROWS * SEGMENTS, WIDTH], tl.float32)
        grads = tl.zeros([ROWS * SEGMENTS, WIDTH], tl.float32)
        for part in tl.static_range(PARTS):
            normal = (x[part] - mean) * rstd
            grad_normal = grad_y[part] * weight[part]
            products += grad_normal * normal
            grads += grad_normal
            weight_sums = weight_sums + (weight_sum[part] + grad_y[part] * normal,)
            bias_sums = bias_sums + (bias_sum[part] + grad_y[part],)
            normals = normals + (normal,)
            grad_normals = grad_normals + (grad_normal,)
        weight_sum, bias_sum = weight_sums, bias_sums
        mean_product = row_mean(products, hidden_size, ROWS, SEGMENTS)
        mean_grad = row_mean(grads, hidden_size, ROWS, SEGMENTS)
        for part in tl.static_range(PARTS):
            grad = grad_x[part] + rstd * (grad_normals[part] - mean_grad - normals[part] * mean_product)
            tl.store(grad_ptr + offset + part * WIDTH, grad.to(grad_ptr.dtype.element_ty), mask=mask)
    column_ptr += (program * ROWS + lane // SEGMENTS) * hidden_size + column
    store_columns(column_ptr, weight_sum, in_row, PARTS, WIDTH)
    store_columns(column_ptr + programs * ROWS * hidden_size, bias_sum, in_row, PARTS, WIDTH)


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel; arguments are valid and contiguous.

    Returns:
        The norm in `dtype`, mean and reciprocal standard deviation `(...)` of each row in float32.
    """
    y = torch.empty_like(x, dtype=dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    launch_norm_forward(x, weight, bias, y, mean, rstd, eps=eps)
    return y, mean, rstd


def launch_norm_forward(x: Tensor, *others: Tensor, eps: float) -> None:
    """Launch the forward kernel on its tensors, if they have elements."""
    tile, numbers = row_plan(x, x.shape[-1], NORM_FORWARD)
    if x.numel():
        grid = tile.num_programs, 1, 1
        launch(norm_forward_kernel, grid, (x, *others), (*numbers, eps), tile[:4], tile.num_warps)


def norm_backward(
    grad_x: Tensor, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel and add up its sums in a fixed order.

    X has another gradient, `grad_x`, beside.

    Returns:
        Both ways' gradient of x, like x, and those of weight and bias.
    """
    grad, hidden_size = torch.empty_like(x), x.shape[-1]
    plan = row_plan(x, hidden_size, NORM_BACKWARD)
    columns = x.new_empty(2, plan[0].num_programs * plan[0].rows, hidden_size, dtype=torch.float32)
    launch_norm_backward(grad_x, grad_y, x, mean, rstd, weight, grad, columns, plan=plan)
    (columns,) = gather_sums(None, None, columns)
    return grad, columns[0].to(weight.dtype), columns[1].to(bias.dtype)


def launch_norm_backward(*tensors: Tensor, plan: tuple[NormTile, tuple[int, int]]) -> None:
    """Launch the backward kernel on its tensors, if they have elements."""
    tile, numbers = plan
    if tensors[0].numel():
        grid = tile.num_programs, 1, 1
        launch(norm_backward_kernel, grid, tensors, numbers, tile[:4], tile.num_warps)


def row_plan(x: Tensor, group_size: int, registers: tuple[float, float]) -> tuple[NormTile, tuple[int, int]]:
    """Return the tile of a kernel that reduces along rows, the number of rows, and the segments of a row."""
    return _row_plan(x.numel(), x.shape[-1], group_size, num_multiprocessors(x.device), registers)


@planned
def _row_plan(
    num_elements: int, hidden_size: int, group_size: int, num_multiprocessors: int, registers
) -> tuple[NormTile, tuple[int, int]]:
    num_rows = num_elements // hidden_size
    tile = norm_tile(num_rows, hidden_size, group_size, num_multiprocessors, registers)
    return tile, (num_rows, hidden_size // (tile.parts * tile.width))
