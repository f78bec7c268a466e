"""Triton kernel of the second stage of every backward pass.

Partial sums to gradients, in a fixed order, one launch.
"""

import torch
from torch import Tensor

from .triton_launch import launch, planned
from .triton_math import tl, triton

TILE = 2**14  # sums that a program reads at once
COLUMNS = 32  # columns of a program, whole cache lines
NUM_WARPS = 16


@triton.jit
def table_sums(
    program, partial_ptr, denominator_ptr, grad_numerator_ptr, grad_denominator_ptr,
    num_rows, segments_per_row, rows_a, rows_b, ROWS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Store the gradients of one coefficient, the ones of a_0..a_5 and |b_1|..|b_4| for programs 0 to 9."""
    segment = tl.arange(0, SEGMENTS)
    segment_ptr = partial_ptr + program.to(tl.int64) * num_rows * segments_per_row + segment[:, None]
    total = tl.zeros([SEGMENTS, ROWS], tl.float32)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)[None, :]
        mask = (row < num_rows) & (segment < segments_per_row)[:, None]
        total += tl.load(segment_ptr + row.to(tl.int64) * segments_per_row, mask=mask, other=0.0)
    sums = tl.sum(total, 1)  # along memory: pairwise in the interpreter, too
    rows = tl.where(program < 6, rows_a, rows_b)
    table_row = segment // (segments_per_row // rows)  # neighbouring segments of a group stand together
    for group in range(rows):
        value = tl.sum(tl.where(table_row == group, sums, 0.0))
        if program < 6:
            offset = group * 6 + program
            tl.store(grad_numerator_ptr + offset, value.to(grad_numerator_ptr.dtype.element_ty))
        else:
            offset = group * 4 + program - 6
            b = tl.load(denominator_ptr + offset)
            value = tl.where(b < 0, -value, value)  # |b|'s slope, +1 at 0
            tl.store(grad_denominator_ptr + offset, value.to(grad_denominator_ptr.dtype.element_ty))


@triton.jit
def column_sums(
    block, column_ptr, column_sum_ptr, num_rows, hidden_size, COLUMN_ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Store the sums over the rows of one block of columns."""
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    column_ptr += column[None, :]
    total = tl.zeros([COLUMN_ROWS, COLUMNS], tl.float32)
    for first in range(0, num_rows, COLUMN_ROWS):
        row = first + tl.arange(0, COLUMN_ROWS)[:, None]
        inside = (row < num_rows) & (column < hidden_size)[None, :]
        total += tl.load(column_ptr + row.to(tl.int64) * hidden_size, mask=inside, other=0.0)
    tl.store(column_sum_ptr + column, tl.sum(total, 0), mask=column < hidden_size)


@triton.jit(
    do_not_specialize=("num_rows", "segments_per_row", "num_column_rows", "hidden_size", "rows_a", "rows_b")
)
def gather_sums_kernel(
    partial_ptr,  # (10, num_rows, segments_per_row) float32: the sums for a_0..a_5 and |b_1|..|b_4|
    column_ptr,  # (sets, num_column_rows, hidden_size) float32
    denominator_ptr,  # (rows_b, 4), any float
    grad_numerator_ptr,  # (rows_a, 6), any float
    grad_denominator_ptr,  # (rows_b, 4), any float
    column_sum_ptr,  # (sets, hidden_size) float32
    num_rows: tl.int32,
    segments_per_row: tl.int32,
    num_column_rows: tl.int32,
    hidden_size: tl.int32,
    rows_a: tl.int32,
    rows_b: tl.int32,
    COEFFICIENTS: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    COLUMN_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute the tables' gradients and the column sums.

    Grid (COEFFICIENTS + sets * ceil(hidden_size / COLUMNS),): one program a coefficient, COEFFICIENTS being
    10, or 0 where there are no tables, and one for each block of columns. One launch does both: a launch for
    each would cost more than the sums take.
    """
    program = tl.program_id(0)
    if program < COEFFICIENTS:
        pointers = partial_ptr, denominator_ptr, grad_numerator_ptr, grad_denominator_ptr
        table_sums(program, *pointers, num_rows, segments_per_row, rows_a, rows_b, ROWS, SEGMENTS)
    else:
        blocks = tl.cdiv(hidden_size, COLUMNS)
        block = (program - COEFFICIENTS) % blocks
        column_set = (program - COEFFICIENTS) // blocks
        column_ptr += column_set.to(tl.int64) * num_column_rows * hidden_size
        column_sum_ptr += column_set * hidden_size
        column_sums(block, column_ptr, column_sum_ptr, num_column_rows, hidden_size, COLUMN_ROWS, COLUMNS)


def gather_sums(
    tables: tuple[Tensor, Tensor] | None, partial: Tensor | None, columns: Tensor | None
) -> tuple[Tensor, ...]:
    """Launch the kernel.

    Args:
        tables: numerator and denominator, contiguous; None: there are none, nor `partial`.
        partial: `(10, rows, segments_per_row)`, float32: the ten sums of each segment.
        columns: `(sets, rows, hidden_size)`, sums of columns, float32; None: there are none.

    Returns:
        The gradients of both tables, in their dtypes, where there are tables, and the column sums
        `(sets, hidden_size)` in float32, where there are columns.
    """
    given = partial if partial is not None else columns
    assert given is not None
    nothing = given.new_empty(0)
    grads, rows, segments_per_row, coefficients = (nothing, nothing), (1, 1), 1, 0
    if tables is not None:
        grads = torch.empty_like(tables[0]), torch.empty_like(tables[1])
        rows, segments_per_row, coefficients = (len(tables[0]), len(tables[1])), given.shape[-1], 10
    sums = given.new_empty(0, 0) if columns is None else columns.new_empty(columns.shape[0], columns.shape[2])
    launch(
        gather_sums_kernel,
        (coefficients + sums.shape[0] * triton.cdiv(sums.shape[1], COLUMNS), 1, 1),
        (
            *(nothing if tensor is None else tensor for tensor in (partial, columns, tables and tables[1])),
            *grads,
            sums,
        ),
        (
            *(0 if partial is None else partial.shape[1], segments_per_row),
            *(0 if columns is None else columns.shape[1], sums.shape[1], *rows),
        ),
        (coefficients, *tile_of(segments_per_row), TILE // COLUMNS, COLUMNS),
        NUM_WARPS,
    )
    return (*(grads if tables is not None else ()), *(() if columns is None else (sums,)))


@planned
def tile_of(segments_per_row: int) -> tuple[int, int]:
    """Return the rows and segments of partial sums that a program reads at once."""
    segments = max(triton.next_power_of_2(segments_per_row), 16)
    return max(TILE // segments, 1), segments
