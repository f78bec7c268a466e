"""Triton kernels of residual addition, layer norm and group rational in one pass, forward and backward.

Both see a row of `hidden_size` channels as segments of WIDTH neighbouring channels of one group, padded to a power of
two of segments. A program takes one row at a time and walks over the tensor, so each thread keeps its channels: their
weights, coefficients and sums stay in registers.
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
    derivative_coefficients,
    load_denominator,
    load_numerator,
    no_sums,
    quotient,
    slope_times_q,
    store_sums,
)
from .triton_rational import gather_sums, num_multiprocessors
from .triton_tiles import Tile, norm_tile

NORM_SIZES = ("num_rows", "segments_per_row", "segments_per_group", "numerator_stride", "denominator_stride", "eps")


@triton.jit(do_not_specialize=NORM_SIZES)
def add_norm_rational_forward_kernel(
    residual_ptr,  # (num_rows, hidden_size), contiguous, any float
    branch_ptr,  # (num_rows, hidden_size), contiguous, any float
    weight_ptr,  # (hidden_size,), any float
    bias_ptr,  # (hidden_size,), any float
    numerator_ptr,  # (1 or num_groups, 6), any float; numerator_stride is 0 when one row serves all groups
    denominator_ptr,  # (1 or num_groups, 4), likewise
    total_ptr,  # like residual
    y_ptr,  # like branch
    mean_ptr,  # (num_rows,) float32
    rstd_ptr,  # (num_rows,) float32
    num_rows: tl.int64,
    segments_per_row: tl.int32,
    segments_per_group: tl.int32,
    numerator_stride: tl.int32,
    denominator_stride: tl.int32,
    eps: tl.float32,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Total = residual + branch, rounded to its dtype; y = rational(layer norm of total), and the norm's statistics.

    Grid (num_programs,). Memory: two reads and two writes of each element. Arithmetic: float32.
    """
    segment = tl.arange(0, SEGMENTS)[:, None]
    column = segment * WIDTH + tl.arange(0, WIDTH)[None, :]
    in_row = segment < segments_per_row
    hidden_size = segments_per_row * WIDTH
    group = tl.where(in_row, segment // segments_per_group, 0)
    a = load_numerator(numerator_ptr + group * numerator_stride)
    b = load_denominator(denominator_ptr + group * denominator_stride)
    weight = tl.load(weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        offset = row * hidden_size + column
        residual = tl.load(residual_ptr + offset, mask=in_row, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + offset, mask=in_row, other=0.0).to(tl.float32)
        total = (residual + branch).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offset, total, mask=in_row)
        x = total.to(tl.float32)
        mean = tl.sum(x) / hidden_size
        centred = tl.where(in_row, x - mean, 0.0)
        variance = tl.sum(centred * centred) / hidden_size
        rstd = 1.0 / tl.sqrt(variance + eps)
        y, _ = quotient(centred * rstd * weight + bias, a, b)
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=in_row)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=NORM_SIZES)
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
    partial_ptr,  # (10, num_programs, segments_per_row) float32: the sums for a_0..a_5 and |b_1|..|b_4|
    column_ptr,  # (2, num_programs, hidden_size) float32: the sums for weight and bias
    num_rows: tl.int64,
    segments_per_row: tl.int32,
    segments_per_group: tl.int32,
    numerator_stride: tl.int32,
    denominator_stride: tl.int32,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradient of total, both ways joined, and for each program its sums for the coefficients and the norm.

    Grid (num_programs,). Memory: three reads and one write of each element. Arithmetic: float32.
    """
    segment = tl.arange(0, SEGMENTS)[:, None]
    column = segment * WIDTH + tl.arange(0, WIDTH)[None, :]
    in_row = segment < segments_per_row
    hidden_size = segments_per_row * WIDTH
    group = tl.where(in_row, segment // segments_per_group, 0)
    a = load_numerator(numerator_ptr + group * numerator_stride)
    b = load_denominator(denominator_ptr + group * denominator_stride)
    a_slope, b_slope = derivative_coefficients(a, b)
    weight = tl.load(weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    sums = no_sums(tl.zeros([SEGMENTS], tl.float32))
    weight_sum = tl.zeros([SEGMENTS, WIDTH], tl.float32)
    bias_sum = tl.zeros([SEGMENTS, WIDTH], tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        offset = row * hidden_size + column
        total = tl.load(total_ptr + offset, mask=in_row, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + offset, mask=in_row, other=0.0).to(tl.float32)
        grad_total = tl.load(grad_total_ptr + offset, mask=in_row, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normal = (total - tl.load(mean_ptr + row)) * rstd
        x = normal * weight + bias
        f, reciprocal = quotient(x, a, b)
        u = grad_y * reciprocal  # 0 outside of the row, and so is all that follows
        grad_x = u * slope_times_q(x, f, a_slope, b_slope)
        sums = add_coefficient_terms(sums, x, u, f)
        weight_sum += grad_x * normal
        bias_sum += grad_x
        grad_normal = grad_x * weight
        along = tl.sum(grad_normal * normal) / hidden_size
        mean_grad = tl.sum(grad_normal) / hidden_size
        grad = grad_total + rstd * (grad_normal - mean_grad - normal * along)
        tl.store(grad_ptr + offset, grad.to(grad_ptr.dtype.element_ty), mask=in_row)
    program, programs = tl.program_id(0), tl.num_programs(0)
    column_ptr += program * hidden_size + column
    tl.store(column_ptr, weight_sum, mask=in_row)
    tl.store(column_ptr + programs * hidden_size, bias_sum, mask=in_row)
    segment = tl.arange(0, SEGMENTS)
    partial_ptr += program * segments_per_row + segment
    store_sums(partial_ptr, programs * segments_per_row, sums, segment < segments_per_row)


def add_norm_rational_forward(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, numerator: Tensor, denominator: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel; arguments are valid and contiguous.

    Returns:
        total like residual, y like branch, mean and reciprocal standard deviation `(...)` of each row in float32.
    """
    total, y = torch.empty_like(residual), torch.empty_like(branch)
    mean, rstd = (residual.new_empty(residual.shape[:-1], dtype=torch.float32) for _ in range(2))
    tile, layout = _plan(residual, numerator, denominator)
    if residual.numel():
        with torch.accelerator.device_index(residual.device.index):  # pyright: ignore[reportArgumentType]
            add_norm_rational_forward_kernel[(tile.num_programs,)](
                residual, branch, weight, bias, numerator, denominator, total, y, mean, rstd,
                *layout, eps, tile.segments, tile.width, num_warps=tile.num_warps,
            )  # fmt: skip
    return total, y, mean, rstd


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernel and add up its sums in a fixed order; arguments are valid and contiguous.

    Returns:
        The gradient of both summands, like total, and those of weight, bias, numerator and denominator.
    """
    grad, hidden_size = torch.empty_like(total), total.shape[-1]
    tile, layout = _plan(total, numerator, denominator)
    partial = total.new_empty(10, tile.num_programs, hidden_size // tile.width, dtype=torch.float32)
    columns = total.new_empty(2, tile.num_programs, hidden_size, dtype=torch.float32)
    if total.numel():
        with torch.accelerator.device_index(total.device.index):  # pyright: ignore[reportArgumentType]
            add_norm_rational_backward_kernel[(tile.num_programs,)](
                grad_total, grad_y, total, mean, rstd, weight, bias, numerator, denominator, grad, partial, columns,
                *layout, tile.segments, tile.width, num_warps=tile.num_warps,
            )  # fmt: skip
    grad_weight, grad_bias = (
        column.sum(0) for column in columns
    )  # separate tensors: an operator's results share no memory
    tables = gather_sums(partial, numerator, denominator, hidden_size // tile.width)
    return grad, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), *tables


def _plan(total: Tensor, numerator: Tensor, denominator: Tensor) -> tuple[Tile, tuple[int, ...]]:
    """Tile, and the kernels' arguments from num_rows to denominator_stride."""
    hidden_size, num_groups = total.shape[-1], max(numerator.shape[0], denominator.shape[0])
    num_rows = total.numel() // hidden_size
    tile = norm_tile(num_rows, hidden_size, hidden_size // num_groups, num_multiprocessors(total.device))
    segments_per_row = hidden_size // tile.width
    strides = 0 if numerator.shape[0] == 1 else 6, 0 if denominator.shape[0] == 1 else 4
    return tile, (num_rows, segments_per_row, segments_per_row // num_groups, *strides)
