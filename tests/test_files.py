"""A file appears whole like a folder, and parents made for either go after an error."""

import pytest

from flashkat_hf.files import replacing


def test_a_file_takes_anothers_place(tmp_path):
    target = tmp_path / "deep/er/weights"
    for text in ("one", "two"):
        with replacing(target, folder=False) as new:
            new.write_text(text)
            assert not target.exists() or target.read_text() == "one"
        assert target.read_text() == text
    with pytest.raises(ZeroDivisionError), replacing(target, folder=False) as new:
        new.write_text(f"three {1 / 0}")
    assert target.read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["weights"]


@pytest.mark.parametrize("folder", [True, False])
def test_an_error_takes_the_new_parents_away(tmp_path, folder):
    (tmp_path / "deep").mkdir()
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "deep/er/est/target", folder):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["deep"]
