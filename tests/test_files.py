"""A file appears whole like a folder, and parents made for either go after an error."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
from safetensors.torch import save_file

from flashkat_hf.files import replacing, sync_tree, workspace


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


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
@pytest.mark.parametrize("folder", [True, False])
def test_permissions_are_the_umasks(tmp_path, umask, mode, folder):
    """Safetensors writes files that nobody but their owner reads."""
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "new", folder) as new:
            save_file({"x": torch.zeros(1)}, new / "deep.safetensors" if folder else new)
            if folder:
                (new / "config.json").write_text("{}")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "new", *(tmp_path / "new").rglob("*")) if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}
    assert len(files) == 1 + folder


def test_permissions_of_a_synced_folder(tmp_path):
    """As a checkpoint of a run is written; what a link leads to stays as it is."""
    (tmp_path / "new").mkdir(mode=0o755)
    save_file({"x": torch.zeros(1)}, tmp_path / "new/model.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "new/link").symlink_to(tmp_path / "other.safetensors")
    sync_tree(tmp_path / "new")
    assert (tmp_path / "new/model.safetensors").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "other.safetensors").stat().st_mode & 0o777 == 0o600


HOLD = """
import sys, time
from flashkat_hf.files import workspace
with workspace("flashkat-test-") as folder:
    (folder / "sub").mkdir()
    (folder / "sub" / "file").touch()
    print(folder.name, flush=True)
    time.sleep(600)
"""


def test_a_workspace_goes_with_its_process(tmp_path, monkeypatch):
    """That of a killed process goes with the next one's; that of a living one stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command, environment = [sys.executable, "-c", HOLD], os.environ | {"TMPDIR": str(tmp_path)}
    killed, living = (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)
    )
    try:
        names = [process.stdout.readline().strip() for process in (killed, living)]
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        (tmp_path / "flashkat-test-file").touch()
        assert {path.name for path in tmp_path.iterdir()} == {*names, "flashkat-test-file"}
        with workspace("flashkat-test-") as folder:
            assert list(folder.iterdir()) == []
            assert {path.name for path in tmp_path.iterdir()} == {names[1], folder.name, "flashkat-test-file"}
    finally:
        for process in (killed, living):
            process.kill()
            process.wait()
            process.stdout.close()
    with pytest.raises(ZeroDivisionError), workspace("flashkat-test-"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["flashkat-test-file"]
