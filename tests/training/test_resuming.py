"""Runs that end early, by a signal, a kill, a bad loss or a full disk, and go on to the same bits."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from data_helpers import write_shards
from helpers import ROOT
from small_runs import after_step, contents, make_images, metrics, small_run, weights

from flashkat_hf.data.augmentation import Augmentation
from flashkat_hf.data.batches import EvalBatches, TrainBatches
from flashkat_hf.data.held import HeldBatches
from flashkat_hf.training import run as assembly
from flashkat_hf.training import train
from flashkat_hf.training import trainer as loop
from flashkat_hf.training.state import Checkpoints
from flashkat_hf.training.trainer import Trainer


@pytest.mark.parametrize(
    ("kills", "workers", "device"),
    [(20, 0, "cpu"), (4, 1, "cpu"), pytest.param(4, 1, "cuda", marks=pytest.mark.gpu)],
)
def test_killed_at_any_point_and_resumed_to_the_bit(tmp_path, kills, workers, device):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"] = str(device == "cpu").lower()
    command = [sys.executable, ROOT / "tests/support/killing.py", tmp_path, str(kills), str(workers)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    done = json.loads(result.stdout.splitlines()[-1])
    assert done["killed"] >= kills
    assert done["during_a_save"] >= kills // 4
    assert done["resumed"] >= kills // 4
    expected = metrics(tmp_path / "whole")
    assert len(expected) == 3 * 3 + 3  # a line for each update and each epoch
    for run in range(1, done["runs"] + 1):
        output = tmp_path / f"killed-{run}"
        assert metrics(output) == expected
        assert {path.name for path in output.iterdir()} == {
            path.name for path in (tmp_path / "whole").iterdir()
        }
        for name in ("best", "last"):
            expected_weights, found = (weights(folder, name) for folder in (tmp_path / "whole", output))
            assert expected_weights.keys() == found.keys()
            assert all(tensor.equal(found[key]) for key, tensor in expected_weights.items())


def test_a_run_saves_and_compares_what_auto_became(tmp_path, monkeypatch):
    """The caller's settings stay as they are."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # else a CPU refuses "augmentation" at once
    images, output = make_images(tmp_path / "images"), tmp_path / "run"

    def settings(on_device: str):
        values = small_run(images, output, epochs=1, resume=True)
        values.augmentation = Augmentation(rand_augment=None, erasing=0.5, on_device=on_device)
        return values

    try:
        given = settings("auto")
        train(given)
        assert given == settings("auto")
        assert json.loads((output / "settings.json").read_text())["on_device"] == "nothing"
        assert train(settings("auto")) is None  # the same run, and complete
        with pytest.raises(ValueError, match=r"other settings: on_device was nothing and is augmentation$"):
            train(settings("augmentation"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_the_run_and_it_goes_on_to_the_bit(run, monkeypatch, capsys, number, code):
    settings = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.3, "ema_decay": 0.7, "micro_batch": 4}
    whole = run("whole", **settings)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        after_step(patch, 4, lambda _: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as ended:
            run("stopped", **settings)
    assert ended.value.code == code
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    checkpoint = whole.with_name("stopped") / "checkpoints" / "step-4"
    assert f"saved after step 4 in {checkpoint}; --resume goes on" in capsys.readouterr().err
    starts, epoch = [], TrainBatches.epoch
    monkeypatch.setattr(TrainBatches, "epoch", lambda self, *at: starts.append(at) or epoch(self, *at))
    stopped = run("stopped", resume=True, **settings)
    assert starts == [(1, 2)]  # the second epoch, after one update of two micro-batches
    assert metrics(stopped) == metrics(whole)
    for name in ("best", "last"):
        assert all(
            torch.equal(tensor, weights(stopped, name)[key]) for key, tensor in weights(whole, name).items()
        )
    assert not checkpoint.exists()


def signalled(function):
    """Return the function with a SIGTERM before each call."""

    def call(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments)

    return call


def test_images_on_the_device_go_on_to_the_bit(tmp_path, monkeypatch, capsys):
    """A run whose images lie on the device is ended by SIGTERM, in training and while it reads them."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    images = make_images(tmp_path / "images")

    def run(name: str, **others) -> Path:
        settings = small_run(images, tmp_path / name, image_size=24, patch_size=8, **others)
        settings.augmentation = Augmentation("shifts", rand_augment=None, erasing=0.0, on_device="everything")
        train(settings)
        return tmp_path / name

    whole = run("whole")
    with monkeypatch.context() as patch:
        after_step(patch, 4, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run("stopped")
    with monkeypatch.context() as patch:
        patch.setattr(HeldBatches, "read", signalled(HeldBatches.read))
        for name, others in (("stopped", {"resume": True}), ("never", {})):
            with pytest.raises(SystemExit):
                run(name, **others)
    said = capsys.readouterr().err
    assert "SIGTERM: saved after step 4 in " in said
    assert "SIGTERM: nothing is trained yet; --resume begins" in said
    for name in ("stopped", "never"):
        assert metrics(run(name, resume=True)) == metrics(whole)
        found = weights(tmp_path / name)
        assert all(torch.equal(tensor, found[key]) for key, tensor in weights(whole).items())


def test_a_signal_at_the_last_update_leaves_the_evaluation_to_be_done(run, monkeypatch):
    whole = run("whole")
    with monkeypatch.context() as patch:
        after_step(patch, 6, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run("stopped")
    assert not whole.with_name("stopped").joinpath("last").exists()
    assert metrics(run("stopped", resume=True)) == metrics(whole)


@pytest.mark.parametrize("number", [1, 2], ids=["raw", "averaged"])
def test_a_signal_in_an_evaluation_does_not_wait(run, monkeypatch, number):
    """Not even for the batch; the evaluation is done again, to the bit."""
    whole = run("whole", ema_decay=0.5)
    started, evaluations, iterate = [], [], EvalBatches.__iter__

    def slow(batches):
        evaluations.append(1)
        if len(evaluations) == number:
            started.append(time.monotonic())
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(20)
        yield from iterate(batches)

    with monkeypatch.context() as patch:
        patch.setattr(EvalBatches, "__iter__", slow)
        with pytest.raises(SystemExit):
            run("stopped", ema_decay=0.5)
    assert time.monotonic() - started[0] < 10
    assert (
        metrics(whole.with_name("stopped")) == metrics(whole)[:3]
    )  # the updates of the epoch, and not its end
    stopped = run("stopped", ema_decay=0.5, resume=True)
    assert metrics(stopped) == metrics(whole)
    assert all(torch.equal(tensor, weights(stopped)[name]) for name, tensor in weights(whole).items())


def test_a_second_ctrl_c_does_not_wait(run, monkeypatch):
    after_step(monkeypatch, 2, lambda _: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        run()


def test_checkpoints_by_steps_and_by_time(run, monkeypatch):
    saved = []
    save = Trainer._save
    monkeypatch.setattr(
        Trainer, "_save", lambda trainer: saved.append(trainer.progress.step) or save(trainer)
    )
    output = run("steps", checkpoint_steps=2, keep_checkpoints=5, keep_after_success=True)
    assert saved == [2, 4]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-2", "step-4"]
    saved.clear()
    run("minutes", checkpoint_minutes=1e-9)
    assert saved == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(run, monkeypatch, value):
    """The message names step, rate and checkpoint.

    The checkpoint is from before; --resume leaves the update out.
    """
    step = Trainer._update

    def spoilt(trainer, batches) -> None:
        if trainer.progress.step == 3:
            batches = iter(
                [{**batch, "pixel_values": batch["pixel_values"] * value} for batch in [next(batches)]]
            )
        step(trainer, batches)

    monkeypatch.setattr(Trainer, "_update", spoilt)
    settings = {"checkpoint_steps": 2, "log_steps": 100, "epochs": 3}
    with pytest.raises(
        ValueError,
        match=r"^the loss is nan at step 4, learning rate 0.000\d+; last good check\S+ \S+/step-2;",
    ):
        run("bad", **settings)
    monkeypatch.setattr(loop, "measure", lambda *_, **__: {"top1": 0.5, "top5": 1.0, "count": 6})
    output = run("bad", resume=True, skip_nonfinite=True, **settings)
    assert json.loads((output / "summary.json").read_text())["skipped_updates"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(output).values())
    lines = [line for line in metrics(output) if "kind" not in line]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_weights_that_are_not_finite_are_not_saved(run, monkeypatch):
    """Though no loss has shown it yet."""

    def spoil(trainer) -> None:
        trainer.model.module.classifier.bias.data[0] = math.inf

    after_step(monkeypatch, 4, spoil)
    with pytest.raises(
        ValueError, match=r"the weights are not finite after step 4, .*: \S+/step-2; lower --learning_rate"
    ):
        run(checkpoint_steps=2)
    with pytest.raises(
        ValueError, match=r"not finite after step 4, .*; last good checkpoint: none; .* --skip_nonfinite"
    ):
        run("other", max_steps=4)


def test_a_full_disk_names_the_last_good_checkpoint(run, monkeypatch, tmp_path):
    def fill(trainer) -> None:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(error))

    with monkeypatch.context() as patch:
        after_step(patch, 3, fill)
        with pytest.raises(OSError, match=r"No space left on device; last good checkpoint: \S+/step-2$"):
            run("full", checkpoint_steps=2)
    monkeypatch.undo()
    assert metrics(run("full", checkpoint_steps=2, resume=True)) == metrics(run("whole"))


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many kilobytes, or gives it another size."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(kilobytes: int) -> Path:
        options = f"{'remount,' if path.is_mount() else ''}size={kilobytes}k"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=False).returncode:
            pytest.skip("mounting needs root")
        return path

    yield mount
    if path.is_mount():
        subprocess.run(["umount", path], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting needs root on Linux")
@pytest.mark.parametrize("kilobytes", [400, 1600, 2800, 3600])
def test_a_disk_that_is_really_full(run, small_disk, kilobytes):
    """While best/ is written, or the first, or the second checkpoint.

    With more room the run goes on to the bit.
    """
    small_disk(kilobytes)
    settings = {"checkpoint_steps": 2, "epochs": 3}
    full = (
        r"^[^\n]*(No space left on device|perhaps the disk is full)[^\n]*; "
        r"last good checkpoint: (none|\S+/step-\d)$"
    )
    with pytest.raises(OSError, match=full):
        run("disk/run", **settings)
    small_disk(20_000)
    assert metrics(run("disk/run", resume=True, **settings)) == metrics(run("whole", **settings))


def stopped(run, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        after_step(patch, 2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run()


def test_another_run_is_not_gone_on_with(run, monkeypatch, images, tmp_path):
    stopped(run, monkeypatch)
    output = tmp_path / "run"
    before = contents(output)
    built = []
    monkeypatch.setattr(assembly, "build_model", lambda *_: built.append(1))
    for message, settings in (
        (r"other settings: epochs was 2 and is 3$", {"epochs": 3, "warmup_epochs": 0.2}),
        (r"other settings: mixup was 0.0 and is 0.8, seed was 0 and is 1$", {"mixup": 0.8, "seed": 1}),
    ):
        with pytest.raises(ValueError, match=message):
            run(resume=True, **settings)
    other = make_images(tmp_path / "other", train=13)
    with pytest.raises(ValueError, match=r"--resume: .*run was trained on other data than .*other"):
        run(resume=True, data=other)
    assert built == []
    assert contents(output) == before
    (output / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"--resume: cannot read .*settings.json"):
        run(resume=True)


def test_the_data_may_have_moved(run, monkeypatch, tmp_path, images):
    """Their contents decide, and images that were left out are counted once."""
    data = tmp_path / "photos"
    shutil.copytree(images, data)
    bad = data / "train" / "red" / "3.png"
    bad.write_bytes(bad.read_bytes()[:-200])
    whole = run("whole", data=data, skip_corrupt=True)
    with monkeypatch.context() as patch:
        after_step(patch, 4, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run(data=data, skip_corrupt=True)
    data.rename(tmp_path / "scratch")
    output = run(data=tmp_path / "scratch", skip_corrupt=True, resume=True)
    assert metrics(output) == metrics(whole)
    assert json.loads((output / "summary.json").read_text())["skipped_images"] == 1
    assert all(torch.equal(tensor, weights(output)[name]) for name, tensor in weights(whole).items())


def test_a_schedulers_log_in_the_output(run, monkeypatch, tmp_path):
    """It is there before the run begins, and stays; --overwrite would remove it, and is refused."""
    (tmp_path / "run").mkdir()
    log = tmp_path / "run" / "slurm-12.out"
    log.write_text("mine")
    with monkeypatch.context() as patch:
        after_step(patch, 2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run(resume=True)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"also holds what others wrote: notes.txt, slurm-12.out"):
        run(overwrite=True)
    output = run(resume=True)
    assert log.read_text() == "mine"
    assert metrics(output) == metrics(run("whole"))


def test_a_setting_that_an_earlier_version_did_not_have(run, monkeypatch, tmp_path):
    stopped(run, monkeypatch)
    path = tmp_path / "run" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["save_dtype"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"save_dtype was float32 and is bfloat16$"):
        run(resume=True, save_dtype="bfloat16")
    run(resume=True)


def test_what_cannot_change_the_weights_may_differ(run, monkeypatch):
    whole = run("whole")
    stopped(run, monkeypatch)
    output = run(resume=True, workers=1, checkpoint_steps=1, log_steps=2)
    assert all(torch.equal(tensor, weights(output)[name]) for name, tensor in weights(whole).items())


def test_a_stream_goes_on_with_as_many_workers(run, monkeypatch, tmp_path):
    """Its order follows from their number."""
    data = write_shards(tmp_path / "shards", [12, 12], [3])
    with monkeypatch.context() as patch:
        after_step(patch, 2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run(data=data, workers=2)
    with pytest.raises(ValueError, match=r"made with other settings: stream_workers was 2 and is 1$"):
        run(data=data, workers=0, resume=True)
    run(data=data, workers=2, resume=True)


def test_resuming_what_has_not_begun_or_is_complete(run, capsys):
    """So that a job that is started again may always say --resume."""
    output = run(resume=True, max_steps=2)
    before = contents(output)
    run(resume=True, max_steps=2)
    assert "is complete; nothing is left to do" in capsys.readouterr().err
    assert contents(output) == before


def test_a_run_killed_at_its_very_end_is_tidied(run, monkeypatch):
    """Between its summary and the removal of its checkpoints; those that are to be kept stay."""
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "remove", lambda _: None)
        output = run(checkpoint_steps=4)
    assert (output / "checkpoints" / "step-4").exists()
    run(checkpoint_steps=4, resume=True)
    assert not (output / "checkpoints").exists()
    output = run("kept", checkpoint_steps=4, keep_after_success=True)
    run("kept", checkpoint_steps=4, resume=True)
    assert (output / "checkpoints" / "step-4").exists()
