"""Tile sizes and warps of the kernels: a pure function of shape, element size and device, never an autotuner.

The kernels see a contiguous tensor as segments of `width` neighbouring channels of one group, at most 16 bytes: what a
thread loads at once. A tile is `segments` of them in a row, contiguous in memory.
"""

import math
from typing import NamedTuple

MAX_WIDTH_BYTES = 16


class Tile(NamedTuple):
    segments: int  # a power of two
    width: int  # channels in a segment: a power of two that divides the group size
    num_warps: int
    num_programs: int


def segment_width(group_size: int, element_bytes: int) -> int:
    return math.gcd(group_size, MAX_WIDTH_BYTES // element_bytes)


def forward_tile(num_elements: int, group_size: int, element_bytes: int) -> Tile:
    """One tile for each program; four segments a thread keep enough loads in flight."""
    segments, width = 256, segment_width(group_size, element_bytes)
    return Tile(segments, width, num_warps=2, num_programs=_cdiv(num_elements, segments * width))


def backward_tile(
    num_elements: int, hidden_size: int, group_size: int, element_bytes: int, num_multiprocessors: int
) -> Tile:
    """Few programs that walk over the tensor in steps of whole rows, so that each thread stays in one group.

    Its coefficients and their partial sums then live in registers, which leave room for six programs on an H100's
    multiprocessor: twelve are two full waves. The step, `num_programs * segments`, must be a
    multiple of the segments in a row.
    """
    segments, width = 128, segment_width(group_size, element_bytes)
    segments_per_row = hidden_size // width
    whole_rows = segments_per_row // math.gcd(segments_per_row, segments)
    wanted = min(12 * num_multiprocessors, _cdiv(num_elements, segments * width))
    return Tile(segments, width, num_warps=4, num_programs=_cdiv(wanted, whole_rows) * whole_rows)


def norm_tile(num_rows: int, hidden_size: int, group_size: int, num_multiprocessors: int) -> Tile:
    """A row at a time, one segment a thread, for kernels that reduce along a row; programs walk over the rows."""
    width = segment_width(group_size, 2)
    segments = 1 << (hidden_size // width - 1).bit_length()
    num_warps = min(max(segments // 32, 1), 16)
    return Tile(segments, width, num_warps, num_programs=min(num_rows, 16 * num_multiprocessors // num_warps))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
