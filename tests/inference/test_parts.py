"""Parts of a Parquet file, and the file that they become."""

import pyarrow
import pytest
from pyarrow import parquet

from flashkat_hf.inference import parts as module
from flashkat_hf.inference.parts import Parts


@pytest.mark.parametrize(("group_bytes", "groups"), [(2**26, 1), (1, 4)])
def test_rows_keep_their_order(tmp_path, monkeypatch, group_bytes, groups):
    """Whatever the order in which parts get done; few rows are one group, which readers like."""
    monkeypatch.setattr(module, "GROUP_BYTES", group_bytes)
    output = tmp_path / "out.parquet"
    parts = Parts(output, 3)
    parts.begin({}, overwrite=False)
    for part, numbers, last in ((2, [6], True), (0, [0, 1], False), (1, [4, 5], True), (0, [2, 3], True)):
        parts.add(part, pyarrow.table({"number": numbers, "words": [["a"] * n for n in numbers]}), last)
    assert parts.missing() == []
    assert parts.join() == 7
    rows = parquet.read_table(output).to_pylist()
    assert rows == [{"number": n, "words": ["a"] * n} for n in range(7)]
    found = [parquet.ParquetFile(output).metadata.row_group(n).num_rows for n in range(groups)]
    assert sum(found) == 7
    assert not parts.folder.exists()


def test_no_rows(tmp_path):
    """A stream may turn out to hold no picture: the file says so, with its columns."""
    output = tmp_path / "out.parquet"
    parts = Parts(output, 1)
    parts.begin({}, overwrite=False)
    parts.add(0, pyarrow.table({"name": pyarrow.array([], pyarrow.string())}), last=True)
    assert parts.join() == 0
    assert parquet.read_table(output).column_names == ["name"]
