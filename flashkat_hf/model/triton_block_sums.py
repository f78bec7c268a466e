"""The gathering of what a block's backward kernels sum up: one launch over one piece of memory."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from .triton_launch import planned
from .triton_math import tl, triton
from .triton_sums import COLUMNS, TILE, column_sums, table_sums, tile_of

LINE = 256  # bytes; pieces of one allocation start as far apart, so that products take the same kernels
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
