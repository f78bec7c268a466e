"""Triton kernel of the backward pass of a rational that stands between two linear maps, with its launcher.

It writes what both neighbours need besides grad_x: y, so that the forward pass need not keep it for the weight
gradient of the map behind, and the column sums of grad_x, the bias gradient of the map in front.
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
    quotient_and_slope,
    store_sums,
)
from .triton_rational import SIZES, backward_plan
from .triton_sums import gather_sums


@triton.jit(do_not_specialize=SIZES)
def rational_linear_backward_kernel(
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
    """grad_x, y, and for each program the sums over the segments that it met, of coefficients and of columns.

    Grid (num_programs,), with num_programs * SEGMENTS a multiple of segments_per_row, as in `rational_backward_kernel`.
    Memory: two reads and two writes of each element. Arithmetic: float32, about 50 instructions an element.
    """
    first = tl.program_id(0).to(tl.int64) * SEGMENTS
    step = tl.num_programs(0).to(tl.int64) * SEGMENTS
    segment = tl.arange(0, SEGMENTS)
    offset = segment[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    group = ((first % segments_per_row).to(tl.int32) + segment[:, None]) % segments_per_row // segments_per_group
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
        tl.store(y_ptr + start * WIDTH + offset, f.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_x_ptr + start * WIDTH + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        sums = add_coefficient_terms(sums, x, u, f, SEGMENTS, WIDTH)
        columns += grad_x
    store_sums(partial_ptr + first + segment, step, sums, None)
    tl.store(column_ptr + first * WIDTH + offset, columns)


def rational_linear_backward(
    grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel and add up its sums in a fixed order; arguments are valid and contiguous.

    Returns:
        grad_x and y like x, the column sums of grad_x `(hidden_size,)` in float32, and both tables' gradients.
    """
    grad_x, y = torch.empty_like(x), torch.empty_like(x)
    tile, layout, partial = backward_plan(x, numerator, denominator, programs_per_multiprocessor=4)
    columns = torch.empty(1, partial.shape[1], x.shape[-1], dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.accelerator.device_index(x.device.index):  # pyright: ignore[reportArgumentType]
            rational_linear_backward_kernel[(tile.num_programs,)](
                grad_y, x, numerator, denominator, grad_x, y, partial, columns, *layout, num_warps=tile.num_warps
            )
    *tables, columns = gather_sums((numerator, denominator), partial, columns)
    return grad_x, y, columns.squeeze(0), *tables
