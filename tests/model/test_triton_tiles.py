"""The rules that the kernels rely on, for every size that a user may bring."""

import pytest

from flashkat_hf.model.op_attention import MAX_TOKENS
from flashkat_hf.model.triton_tiles import (
    ATTENTION_BLOCK,
    NORM_BACKWARD,
    NORM_FORWARD,
    attention_blocks,
    backward_tile,
    forward_tile,
    norm_tile,
)


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("group_size", [1, 3, 5, 24, 48, 66, 96, 192, 384, 1001])
@pytest.mark.parametrize("num_rows", [1, 7, 197, 201728])
def test_tiles(num_rows, group_size, element_bytes):
    hidden_size = 8 * group_size
    num_elements = num_rows * hidden_size
    forward = forward_tile(num_elements, group_size, element_bytes)
    backward = backward_tile(num_elements, hidden_size, group_size, element_bytes, num_multiprocessors=132)
    for tile in (forward, backward):
        assert group_size % tile.width == 0  # a segment lies in one group
        assert tile.width * element_bytes <= 16
        assert tile.width & (tile.width - 1) == 0
        assert tile.segments & (tile.segments - 1) == 0
    assert forward.num_programs * forward.segments * forward.width >= num_elements
    assert (
        backward.num_programs * backward.segments * backward.width % hidden_size == 0
    )  # steps of whole rows
    norm = norm_tile(num_rows, hidden_size, group_size, 132, NORM_BACKWARD)
    assert group_size % (norm.parts * norm.width) == 0  # a thread's segment lies in one group
    assert norm.segments * norm.parts * norm.width >= hidden_size  # a row fits
    assert norm.segments & (norm.segments - 1) == norm.width & (norm.width - 1) == 0
    assert norm.rows * norm.segments >= 32  # a warp is full
    assert 1 <= norm.num_programs <= num_rows
    assert norm.num_programs <= norm_tile(num_rows, hidden_size, group_size, 132, NORM_FORWARD).num_programs


@pytest.mark.parametrize("num_tokens", range(1, MAX_TOKENS + 1))
def test_attention_blocks(num_tokens):
    """Every token lies in a block, and fewer than 32 of the blocks' rows lie beyond the last token."""
    blocks, rest = attention_blocks(num_tokens)
    assert rest in (0, 16, 32)  # rows of matrix instructions
    end = (blocks - 1) * ATTENTION_BLOCK + (rest or ATTENTION_BLOCK)
    assert num_tokens <= end < num_tokens + 32


@pytest.mark.parametrize("hidden_size", [192, 384, 768])
def test_published_sizes_leave_no_thread_idle(hidden_size):
    for group_size in (hidden_size // 8, hidden_size):  # with the rational, and without
        tile = norm_tile(201728, hidden_size, group_size, 132, NORM_BACKWARD)
        assert tile.segments * tile.parts * tile.width == hidden_size
        assert tile.rows * tile.segments == 32 * tile.num_warps
        assert tile.width == 4  # loads of 8 bytes in half precision
