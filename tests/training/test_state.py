"""Folders and checkpoints that are complete or not there, whatever happens while they are written."""

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from flashkat_hf import files
from flashkat_hf.files import replacing, restore, write_text
from flashkat_hf.training import state
from flashkat_hf.training.state import Checkpoints, Progress, all_finite


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def model(accelerator):
    model = torch.nn.Linear(2, 2)
    return accelerator.prepare(model, torch.optim.AdamW(model.parameters()))[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_takes_anothers_place_whole(tmp_path):
    target = tmp_path / "best"
    for text in ("one", "two"):
        with replacing(target) as folder:
            (folder / "model").write_text(text)
            assert not target.exists() or (target / "model").read_text() == "one"
        assert (target / "model").read_text() == text
        assert names(tmp_path) == ["best"]


def test_an_error_keeps_the_earlier_folder(tmp_path):
    target = tmp_path / "best"
    with replacing(target) as folder:
        (folder / "model").write_text("one")
    with pytest.raises(ZeroDivisionError), replacing(target) as folder:
        (folder / "model").write_text(f"two {1 / 0}")
    assert (target / "model").read_text() == "one"
    assert names(tmp_path) == ["best"]


@pytest.mark.parametrize("renamings", [0, 1, 2])
def test_a_kill_between_the_renamings_is_put_right(tmp_path, monkeypatch, renamings):
    """As a killed process leaves it: nothing that stands in `finally` has run."""
    target = tmp_path / "best"
    with replacing(target) as folder:
        (folder / "model").write_text("one")
    rename, left = Path.rename, iter(range(renamings))

    def killed(path, to):
        if next(left, None) is None:
            raise SystemExit
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        manager = replacing(target)
        (manager.__enter__() / "model").write_text("two")
        patch.setattr(files, "restore", lambda _: None)
        if renamings < 2:
            with pytest.raises(SystemExit):
                manager.__exit__(None, None, None)
        else:
            manager.__exit__(None, None, None)
    restore(target)
    assert (target / "model").read_text() == ("two" if renamings == 2 else "one")
    assert names(tmp_path) == ["best"]


def test_text_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_text(path, "one")
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        write_text(path, "two")
    assert path.read_text() == "one"


def test_checkpoints_hold_weights_optimiser_progress_and_files(tmp_path, accelerator, model):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("{}\n")
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    assert checkpoints.newest() is None
    model(torch.ones(1, 2)).sum().backward()
    accelerator._optimizers[0].step()
    progress = Progress(epoch=1, update=2, step=12, loss_sum=0.1 + 0.2, best={"top1": 1 / 3}, seconds=3.5)
    path = checkpoints.save(accelerator, progress, lambda number: number, metrics)
    assert path == checkpoints.newest() == tmp_path / "checkpoints" / "step-12"
    assert (path / "metrics.jsonl").read_text() == "{}\n"
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = accelerator._optimizers[0].state_dict()["state"][0]["exp_avg"].clone()
    model(torch.ones(1, 2)).sum().backward()
    accelerator._optimizers[0].step()
    assert not torch.equal(model.weight, weights["weight"])
    assert checkpoints.load(accelerator, path) == progress
    assert torch.equal(model.weight, weights["weight"])
    assert torch.equal(accelerator._optimizers[0].state_dict()["state"][0]["exp_avg"], moments)


@pytest.mark.parametrize("keep", [1, 2])
def test_older_ones_go_when_the_new_one_is_complete(tmp_path, accelerator, model, monkeypatch, keep):
    checkpoints = Checkpoints(tmp_path, keep)
    for step in (2, 9, 10):  # by number, not by name
        checkpoints.save(accelerator, Progress(step=step), lambda number: number)
    assert [path.name for path in checkpoints.complete()] == ["step-2", "step-9", "step-10"][-keep:]
    assert len(names(tmp_path)) == keep
    removed = []
    monkeypatch.setattr(
        state.shutil, "rmtree", lambda path, **_: removed.append(sorted(os.listdir(tmp_path)))
    )
    checkpoints.save(accelerator, Progress(step=11), lambda number: number)
    assert "step-11" in removed[-1]
    assert not any(name.startswith("step-") and name not in ("step-11", "step-10") for name in removed[-1])


@pytest.mark.parametrize("at", ["safetensors", "torch", "progress", "fsync", "mkdir", "rename"])
def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, accelerator, model, monkeypatch, at):
    """At each kind of writing; PyTorch says it with a RuntimeError."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    first = checkpoints.save(accelerator, Progress(step=1), lambda number: number)
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(error):
        def raises(*_, **__):
            raise error

        return raises

    places = {
        "safetensors": ("accelerate.checkpointing.save", full),
        "torch": (
            "torch.save",
            RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        ),
        "progress": ("pathlib.Path.write_text", full),
        "fsync": ("os.fsync", full),
        "mkdir": ("pathlib.Path.mkdir", full),
        "rename": ("pathlib.Path.rename", full),
    }
    name, error = places[at]
    with monkeypatch.context() as patch:
        patch.setattr(name, fail(error))
        with pytest.raises(
            OSError, match=r"No space left on device|perhaps the disk is full \(.*unexpected pos"
        ):
            checkpoints.save(accelerator, Progress(step=2), lambda number: number)
    assert names(tmp_path) == ["step-1"]
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert checkpoints.save(accelerator, Progress(step=2), lambda number: number).name == "step-2"


def test_errors_of_other_kinds_are_not_taken_for_a_full_disk(tmp_path, accelerator, model, monkeypatch):
    monkeypatch.setattr(
        accelerator, "save_state", lambda _: (_ for _ in ()).throw(RuntimeError("CUDA error"))
    )
    with pytest.raises(RuntimeError, match="CUDA error"):
        Checkpoints(tmp_path, keep=1).save(accelerator, Progress(step=1), lambda number: number)


def test_another_processs_failure_ends_this_one_too(tmp_path, accelerator, model):
    with pytest.raises(OSError, match="another process could not write its part"):
        Checkpoints(tmp_path, keep=1).save(accelerator, Progress(step=1), lambda _: 1)
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_not_taken_for_a_checkpoint(tmp_path, accelerator, model):
    for name in (".step-5.new", ".step-3", "step-x", "other"):
        (tmp_path / name).mkdir()
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.newest() is None
    checkpoints.save(accelerator, Progress(step=6), lambda number: number)
    assert names(tmp_path) == ["other", "step-6", "step-x"]


def test_a_damaged_checkpoint_is_named(tmp_path, accelerator, model):
    checkpoints = Checkpoints(tmp_path, keep=1)
    path = checkpoints.save(accelerator, Progress(step=1), lambda number: number)
    (path / "progress.json").write_text(json.dumps(asdict(Progress()))[:-3])
    with pytest.raises(ValueError, match=rf"^cannot read the checkpoint {path}: [^\n]*$"):
        checkpoints.load(accelerator, path)
    (path / "progress.json").write_text(json.dumps(asdict(Progress())))
    os.truncate(path / "optimizer.bin", 100)
    with pytest.raises(ValueError, match=rf"^cannot read the checkpoint {path}: [^\n]*$"):
        checkpoints.load(accelerator, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_finite_weights(value):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert all_finite(model)
    model[1].bias.data[1] = value
    assert not all_finite(model)
