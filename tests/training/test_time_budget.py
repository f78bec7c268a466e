"""`--time`: as many epochs as fit, and the run that follows is the one that `--epochs` gives."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from small_runs import after_step, make_images, metrics, weights

from flashkat_hf.data.samples import Examples
from flashkat_hf.training import time_budget, train
from flashkat_hf.training import trainer as loop
from flashkat_hf.training.recipe import Settings, parse


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Train on the CPU; return the folder."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    images = make_images(tmp_path / "images", train=24, val=3)

    def run(name: str, **others) -> Path:
        values = {"size": "micro", "batch_size": 8, "workers": 0, "log_steps": 1} | others
        try:
            train(Settings(data=str(images), output=tmp_path / name, **values))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        return tmp_path / name

    return run


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "settings.json").read_text())


@pytest.mark.parametrize(("kept", "epochs"), [(None, 3), (0.05, 7)])
def test_as_many_epochs_as_fit(trained, monkeypatch, kept, epochs):
    """An update of 1 s, an evaluation of 2 s and 0.5 s an image of one: told, and the clock stands still."""
    monkeypatch.setattr(time_budget, "_update_seconds", lambda *_: 1.0)
    monkeypatch.setattr(time_budget, "_evaluation_seconds", lambda *_: (2.0, 0.5, kept))
    clock = time.monotonic()

    class Fits(Exception):
        pass

    found: list[int] = []

    def within(trainer, seconds, started):
        monkeypatch.setattr(time, "monotonic", lambda: clock)
        found.append(time_budget.epochs_within(trainer, seconds, clock - 10))
        raise Fits

    monkeypatch.setattr(loop, "epochs_within", within)
    with pytest.raises(Fits):
        trained("run", time="1m", holdout=0.25, evaluate_epochs=1)
    # 60 x 0.95 = 57 s less 10 before and 5 for the test images leave 42; an epoch is 4 updates and 8 s: 3.5
    # where batches are kept, the first evaluation takes 8 s and others 0.6: (42 - 7.4) / 4.6 = 7.5
    assert found == [epochs]


def test_reading_counts_once_where_batches_are_kept(trained, monkeypatch):
    seen, measured = [], time_budget._evaluation_seconds

    def noted(trainer):
        seen.append(measured(trainer))
        return seen[-1]

    def slowly(split, index, getitem=Examples.__getitem__):
        time.sleep(0.02)
        return getitem(split, index)

    monkeypatch.setattr(time_budget, "_evaluation_seconds", noted)
    monkeypatch.setattr(Examples, "__getitem__", slowly)
    trained("run", time="8s", holdout=0.25)
    ((_, image, kept),) = seen
    assert 0 < kept < 0.015 < image


def test_the_run_is_the_one_of_so_many_epochs(trained, monkeypatch):
    monkeypatch.setattr(
        loop, "epochs_within", lambda *arguments: min(3, time_budget.epochs_within(*arguments))
    )
    timed = trained("timed", time="60s", ema_decay=0.5, holdout=0.25)
    assert settings_of(timed)["epochs"] == 3
    told = trained("told", epochs=3, ema_decay=0.5, holdout=0.25)
    assert metrics(timed) == metrics(told)
    for name in ("best", "last"):
        assert all(
            torch.equal(tensor, weights(told, name)[key]) for key, tensor in weights(timed, name).items()
        )


def test_a_resumed_run_keeps_its_epochs(trained, monkeypatch):
    numbers = iter([3])
    monkeypatch.setattr(loop, "epochs_within", lambda *_: next(numbers))  # it is asked once
    settings = {"time": "60s", "holdout": 0.25}
    with monkeypatch.context() as patch:
        after_step(patch, 4, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            trained("stopped", **settings)
    stopped = trained("stopped", resume=True, **settings)
    assert settings_of(stopped)["epochs"] == 3
    assert metrics(stopped) == metrics(trained("whole", epochs=3, holdout=0.25))
    with pytest.raises(ValueError, match=r"other settings: time was 60s and is 70s$"):
        trained("stopped", resume=True, time="70s", holdout=0.25)


def test_a_time_shorter_than_one_epoch(trained):
    with pytest.raises(
        ValueError, match=r"--time: 0\.1s is shorter than one epoch, .* about \d+ s;"
    ) as caught:
        trained("run", time="0.1s")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "seconds"), [("10m", 600), ("90s", 90), ("1.5h", 5400), ("2M", 120)])
def test_times(text, seconds):
    assert Settings(time=text).seconds == seconds
    assert Settings(time=text).epochs is None


def test_the_time_goes_before_a_recipes_epochs():
    assert parse(["--recipe", "finetune", "--time", "10m"]).epochs is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time", "soon"], "--time: soon is no time such as 10m, 90s or 1.5h"),
        (["--time", "10"], "--time: 10 is no time such as"),
        (["--time", "0m"], "--time: 0m is no time such as"),
        (["--time", "10m", "--epochs", "3"], "--time: 10m chooses the epochs, but --epochs 3 is given"),
    ],
)
def test_bad_times(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(arguments)
