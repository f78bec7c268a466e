"""Triton kernels of the group rational, forward and backward, with one launcher each.

Both see the contiguous tensor as segments (`triton_tiles.py`): segment i holds channels of one row and of
group (i % segments_per_row) // segments_per_group. Only element types, tile sizes and pointer alignment are
compiled in, so another batch size or hidden size runs the same kernel.
"""

from functools import lru_cache

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
from .triton_sums import gather_sums
from .triton_tiles import Tile, backward_tile, forward_tile

MOST_SEGMENTS = 2**13  # of a row, whose partial sums the kernel of the second stage keeps in registers
LAYOUT = (  # what describes a tensor as segments, compiled for any value
    "num_segments",
    "segments_per_row",
    "segments_per_group",
    "numerator_stride",
    "denominator_stride",
)


@triton.jit(do_not_specialize=LAYOUT)
def rational_forward_kernel(
    x_ptr,  # (num_segments * WIDTH,), contiguous, any float
    numerator_ptr,  # (1 or num_groups, 6), any float; numerator_stride is 0 when one row serves all groups
    denominator_ptr,  # (1 or num_groups, 4), likewise
    y_ptr,  # like x
    num_segments: tl.int64,
    segments_per_row: tl.int32,
    segments_per_group: tl.int32,
    numerator_stride: tl.int32,
    denominator_stride: tl.int32,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute y[i] = P_g(x[i]) / Q_g(x[i]), g the group of element i.

    Grid (ceil(num_segments / SEGMENTS),). Memory: one read and one write of each element; the tables are a
    few hundred bytes, stay in the cache and are read once for each segment. Arithmetic: float32.
    """
    first = tl.program_id(0).to(tl.int64) * SEGMENTS
    segment = tl.arange(0, SEGMENTS)[:, None]
    offset = first * WIDTH + segment * WIDTH + tl.arange(0, WIDTH)[None, :]
    group = ((first % segments_per_row).to(tl.int32) + segment) % segments_per_row // segments_per_group
    a = load_numerator(numerator_ptr + group * numerator_stride)
    b = load_denominator(denominator_ptr + group * denominator_stride)
    mask = segment < num_segments - first
    y = quotient(tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32), a, b)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=LAYOUT)
def rational_backward_kernel(
    grad_y_ptr,  # (num_segments * WIDTH,), contiguous, any float
    x_ptr,  # like grad_y
    numerator_ptr,  # (1 or num_groups, 6), any float; numerator_stride is 0 when one row serves all groups
    denominator_ptr,  # (1 or num_groups, 4), likewise
    grad_x_ptr,  # like x
    partial_ptr,  # (10, num_programs, SEGMENTS) float32: the sums for a_0..a_5 and |b_1|..|b_4|
    num_segments: tl.int64,
    segments_per_row: tl.int32,
    segments_per_group: tl.int32,
    numerator_stride: tl.int32,
    denominator_stride: tl.int32,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute grad_x, and for each program and segment of its tile the sums over what it met there.

    Grid (num_programs,), with num_programs * SEGMENTS a multiple of segments_per_row: the step between a
    program's tiles is whole rows, so a segment of the tile stays in one group and its coefficients and sums
    stay in registers. The loop's loads run two tiles ahead; what is written is not kept in the cache (".cs").
    Memory: two reads and one write of each element. Arithmetic: float32, about 48 instructions an element.
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
    for start in tl.range(first, num_segments, step, num_stages=3):
        mask = (segment < num_segments - start)[:, None]
        x = tl.load(x_ptr + start * WIDTH + offset, mask=mask, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + start * WIDTH + offset, mask=mask, other=0.0).to(tl.float32)
        f, reciprocal, slope = quotient_and_slope(x, a, b)
        u = grad_y * reciprocal
        grad_x = u * slope
        grad_x = grad_x.to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptr + start * WIDTH + offset, grad_x, mask=mask, cache_modifier=".cs")
        sums = add_coefficient_terms(sums, x, u, f, SEGMENTS, WIDTH)
    store_sums(partial_ptr + first + segment, step, sums, None)


def rational_forward(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Launch the forward kernel; arguments are valid and contiguous, `x` is `(..., hidden_size)`."""
    y = torch.empty_like(x)
    tile, layout = _forward_plan(x.numel(), *_sizes(x, numerator, denominator))
    if x.numel():
        launch(
            *(rational_forward_kernel, (tile.num_programs, 1, 1), (x, numerator, denominator, y), layout),
            *((tile.segments, tile.width), tile.num_warps),
        )
    return y


def rational_backward(
    grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel and add up its partial sums, in a fixed order.

    Arguments are valid and contiguous.
    """
    grad_x = torch.empty_like(x)
    tile, layout, rows = backward_plan(x, numerator, denominator)
    partial = torch.empty(10, rows, layout[1], dtype=torch.float32, device=x.device)
    if x.numel():
        tensors = grad_y, x, numerator, denominator, grad_x, partial
        constants = tile.segments, tile.width
        launch(
            rational_backward_kernel, (tile.num_programs, 1, 1), tensors, layout, constants, tile.num_warps
        )
    if layout[1] > MOST_SEGMENTS:
        num_groups = max(numerator.shape[0], denominator.shape[0])
        partial = partial.unflatten(-1, (num_groups, -1)).sum(-1)
    return (grad_x, *gather_sums((numerator, denominator), partial, None))


def backward_plan(x: Tensor, numerator: Tensor, denominator: Tensor) -> tuple[Tile, tuple[int, ...], int]:
    """Return the tile, the kernel's numbers, and the rows of its sums `(10, rows, segments_per_row)`.

    The programs' tiles in a row make whole rows. Without elements there are no programs, and the sums are
    empty.
    """
    return _backward_plan(x.numel(), *_sizes(x, numerator, denominator), num_multiprocessors(x.device))


def _sizes(x: Tensor, numerator: Tensor, denominator: Tensor) -> tuple[int, int, int, int]:
    """Return what the plans ask about besides the number of elements."""
    return x.shape[-1], x.element_size(), numerator.shape[0], denominator.shape[0]


@planned
def _forward_plan(
    num_elements: int, hidden_size: int, element_bytes: int, numerator_rows: int, denominator_rows: int
) -> tuple[Tile, tuple[int, ...]]:
    num_groups = max(numerator_rows, denominator_rows)
    tile = forward_tile(num_elements, hidden_size // num_groups, element_bytes)
    return tile, _layout(num_elements, hidden_size, numerator_rows, denominator_rows, tile.width)


@planned
def _backward_plan(
    num_elements: int,
    hidden_size: int,
    element_bytes: int,
    numerator_rows: int,
    denominator_rows: int,
    multiprocessors: int,
) -> tuple[Tile, tuple[int, ...], int]:
    num_groups = max(numerator_rows, denominator_rows)
    tile = backward_tile(num_elements, hidden_size, hidden_size // num_groups, element_bytes, multiprocessors)
    layout = _layout(num_elements, hidden_size, numerator_rows, denominator_rows, tile.width)
    return tile, layout, tile.num_programs * tile.segments * tile.width // hidden_size


def _layout(
    num_elements: int, hidden_size: int, numerator_rows: int, denominator_rows: int, width: int
) -> tuple[int, ...]:
    """Return the kernels' numbers, those in `LAYOUT`."""
    segments_per_row = hidden_size // width
    return (
        num_elements // width,
        segments_per_row,
        segments_per_row // max(numerator_rows, denominator_rows),
        0 if numerator_rows == 1 else 6,
        0 if denominator_rows == 1 else 4,
    )


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 16  # Triton's interpreter; sums as short as a GPU's
    return getattr(torch.get_device_module(device).get_device_properties(device), "multi_processor_count", 64)
