"""The rules that the kernels rely on, for every size that a user may bring."""

import pytest

from flashkat_hf.triton_tiles import backward_tile, forward_tile


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
    assert backward.num_programs * backward.segments * backward.width % hidden_size == 0  # steps of whole rows
