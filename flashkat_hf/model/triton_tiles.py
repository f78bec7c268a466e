"""Tile sizes and warps of the kernels: a pure function of shape, element size and device, never an autotuner.

The kernels see a contiguous tensor as segments of `width` neighbouring channels of one group, at most 16
bytes: what a thread loads at once. A tile is `segments` of them in a row, contiguous in memory.
"""

import math
from typing import NamedTuple

MAX_WIDTH_BYTES = 16
MAX_REGISTERS = 2048  # of a multiprocessor, for each of a warp's 32 threads
NORM_FORWARD = (24, 4)  # registers of a thread, for `norm_tile`: so many, and so many for each channel
NORM_BACKWARD = NORM_RATIONAL_BACKWARD = (16, 28 / 3)
NORM_BACKWARD_TOTALS = (24, 12)
BACKWARD_PROGRAMS = 10  # of a multiprocessor, for `backward_tile`
ATTENTION_BLOCK = 64  # queries, or keys, of a program: 16 for each of four warps


class Tile(NamedTuple):
    segments: int  # a power of two
    width: int  # channels in a segment: a power of two that divides the group size
    num_warps: int
    num_programs: int


def segment_width(group_size: int, element_bytes: int) -> int:
    return math.gcd(group_size, MAX_WIDTH_BYTES // element_bytes)


def forward_tile(num_elements: int, group_size: int, element_bytes: int) -> Tile:
    """Return one tile for each program; four segments a thread keep enough loads in flight."""
    segments, width = 256, segment_width(group_size, element_bytes)
    return Tile(segments, width, num_warps=2, num_programs=_cdiv(num_elements, segments * width))


def backward_tile(
    num_elements: int, hidden_size: int, group_size: int, element_bytes: int, num_multiprocessors: int
) -> Tile:
    """Return a tile for programs that walk over the tensor in steps of whole rows.

    A thread stays in one group, so that its coefficients and their partial sums live in registers. The step,
    `num_programs * segments`, must be a multiple of the segments in a row. There are no more programs than a
    multiprocessor holds at once: those that waited for others to end cost a quarter more time.
    """
    segments, width = 64, segment_width(group_size, element_bytes)
    segments_per_row = hidden_size // width
    whole_rows = segments_per_row // math.gcd(segments_per_row, segments)
    most = max(BACKWARD_PROGRAMS * num_multiprocessors // whole_rows, 1)
    steps = min(_cdiv(num_elements, segments * width * whole_rows), most)
    return Tile(segments, width, num_warps=2, num_programs=steps * whole_rows)


class NormTile(NamedTuple):
    """Layout of rows; the first four numbers are the kernels' constants ROWS, SEGMENTS, PARTS and WIDTH."""

    rows: int  # of a program at a time: a power of two
    segments: int  # of a row: a power of two, at least as many as there are
    parts: int  # loads that a thread needs for its segment
    width: int  # channels of a load: a power of two
    num_warps: int
    num_programs: int


def norm_tile(
    num_rows: int, hidden_size: int, group_size: int, num_multiprocessors: int, registers: tuple[float, float]
) -> NormTile:
    """Return a tile for kernels that reduce along a row: a row at a time, or as many as fill a warp.

    Why so: docs/notes/norm-layout.md.

    A thread's segment lies in one group and has at most 12 channels, whose sums fit in registers; of those
    sizes the one that leaves the fewest threads idle, then the longest one. A row of 192, 384 or 768 channels
    takes 16, 32 or 64 threads, all of them busy. Programs walk over the rows, as many as a multiprocessor's
    registers hold: one more would run when all others have ended.

    Args:
        num_rows: rows of the tensor.
        hidden_size: channels of a row.
        group_size: channels of a group.
        num_multiprocessors: of the device.
        registers: of a thread: so many, and so many for each channel of its segment.
    """
    sizes = [size for size in range(1, 13) if group_size % size == 0]
    size = min(sizes, key=lambda size: (_power_of_two(hidden_size // size) * size, -size))
    width, segments = size & -size, _power_of_two(hidden_size // size)
    rows = max(32 // segments, 1)
    num_warps = min(max(segments // 32, 1), 16)
    warps = min(int(MAX_REGISTERS / (registers[0] + registers[1] * size)), 32)
    return NormTile(
        rows,
        segments,
        size // width,
        width,
        num_warps,
        num_programs=min(_cdiv(num_rows, rows), warps * num_multiprocessors // num_warps),
    )


class LinearTile(NamedTuple):
    rows: int
    columns: int
    step: int  # input features that are multiplied at a time
    chunk: int  # columns of one group
    stages: int
    num_warps: int


def linear_tile(in_features: int, out_features: int, group_size: int) -> LinearTile | None:
    """Return the tile of a linear map with a rational behind it; None where cuBLAS does better."""
    if in_features % 64 or out_features % 128 or group_size % 32:
        return None
    return LinearTile(128, 128, 64, 32, stages=3, num_warps=8)


def attention_blocks(num_tokens: int) -> tuple[int, int]:
    """Return the blocks along the tokens, and the rows of the last one where half a block is enough for it.

    Else 0.

    The 197 tokens of a 224 pixel image are three blocks of 64, and a rest of 5 tokens in 16 rows.
    """
    blocks, rest = _cdiv(num_tokens, ATTENTION_BLOCK), num_tokens % ATTENTION_BLOCK
    return blocks, max(_power_of_two(rest), 16) if 0 < rest <= ATTENTION_BLOCK // 2 else 0


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
