"""Parts of a Parquet file, and the file that they become."""

import pyarrow
import pytest
from pyarrow import parquet

from flashkat_hf.inference import parts as module
from flashkat_hf.inference.parts import Parts


@pytest.mark.parametrize(("group_bytes", "groups"), [(2**26, [7]), (50, [4, 3]), (1, [2, 2, 2, 1])])
def test_rows_keep_their_order(tmp_path, monkeypatch, group_bytes, groups):
    """Rows come in the data's order, whichever part is done first; few rows are one group."""
    monkeypatch.setattr(module, "GROUP_BYTES", group_bytes)
    output = tmp_path / "out.parquet"
    parts = Parts(output, 3)
    parts.begin({}, overwrite=False)
    for part, numbers, last in ((2, [6], True), (0, [0, 1], False), (1, [4, 5], True), (0, [2, 3], True)):
        parts.add(part, pyarrow.table({"number": numbers, "words": [["a"] for _ in numbers]}), last)
    assert parts.missing() == []
    assert parts.join() == 7
    rows = parquet.read_table(output).to_pylist()
    assert rows == [{"number": number, "words": ["a"]} for number in range(7)]
    metadata = parquet.read_metadata(output)
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == groups
    assert not parts.folder.exists()


def test_no_rows(tmp_path):
    """A stream may turn out to hold no picture: the file says so, with its columns."""
    output = tmp_path / "out.parquet"
    parts = Parts(output, 1)
    parts.begin({}, overwrite=False)
    parts.add(0, pyarrow.table({"name": pyarrow.array([], pyarrow.string())}), last=True)
    assert parts.join() == 0
    assert parquet.read_table(output).column_names == ["name"]
    assert parquet.read_metadata(output).num_row_groups == 0


def test_a_broken_part_is_made_anew(tmp_path):
    """A part that the disk has cut short is named and removed; the other parts stay."""
    output = tmp_path / "out.parquet"
    parts = Parts(output, 2)
    parts.begin({}, overwrite=False)
    for part in range(2):
        parts.add(part, pyarrow.table({"number": [part]}), last=True)
    parts.path(1).write_bytes(parts.path(1).read_bytes()[:100])
    with pytest.raises(ValueError, match=r"00000001\.arrow is broken .* the same command makes it anew"):
        parts.join()
    assert parts.missing() == [1]
    assert not output.exists()
    parts.add(1, pyarrow.table({"number": [1]}), last=True)
    assert parts.join() == 2
