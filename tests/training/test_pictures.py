"""Pictures of the learned functions while they are trained: to the trackers, and the film."""

import json
import signal

import pytest
import torch
from PIL import Image
from small_runs import after_step, weights

from flashkat_hf.training import pictures


def noted(output) -> list[int]:
    """Return the epochs of functions.jsonl."""
    return [json.loads(line)["epoch"] for line in (output / "functions.jsonl").read_text().splitlines()]


def test_pictures_of_every_epoch_change_no_weight_and_outlive_a_resume(run, monkeypatch):
    """The film of a run that was stopped and went on begins at its start, and has each epoch once."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plain = run("plain")
    settings = {"film": True, "trackers": ["tensorboard"], "checkpoint_steps": 2}
    with monkeypatch.context() as patch:  # stopped in the second epoch, after the checkpoint of step 4
        after_step(patch, 4, lambda trainer: trainer.signals._note(signal.SIGTERM, None))
        with pytest.raises(SystemExit):
            run("filmed", **settings)
    filmed = run("filmed", **settings, resume=True)
    assert noted(filmed) == [0, 1, 2]
    with Image.open(filmed / "functions.gif") as film:
        assert film.n_frames == 3
    assert (filmed / "functions.png").exists()
    steps = []
    for folder in {path.parent for path in (filmed / "logs").rglob("events*")}:
        log = accumulator.EventAccumulator(str(folder))
        log.Reload()
        if "functions" in log.Tags()["images"]:
            steps += [event.step for event in log.Images("functions")]
    assert steps == [0, 3, 6]
    expected = weights(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(filmed).items())
    assert not (plain / "functions.jsonl").exists()


def test_functions_are_measured_on_held_out_images(run, monkeypatch):
    measured = []
    functions = pictures.model_functions
    monkeypatch.setattr(
        pictures,
        "model_functions",
        lambda model, batches: measured.append(batches) or functions(model, batches),
    )
    run(film=True, max_steps=1)
    assert [len(torch.cat(batches)) for batches in measured] == [6, 6]  # three of each class


def test_a_picture_that_cannot_be_made_is_no_reason_to_stop(run, monkeypatch, capsys):
    def broken(model, batches):
        raise ValueError("act1 has activations that are not finite")

    monkeypatch.setattr(pictures, "model_functions", broken)
    output = run(film=True, max_steps=1)
    assert (output / "summary.json").exists()
    assert not (output / "functions.gif").exists()
    text = "no picture of the functions after epoch 1: act1 has activations that are not finite"
    assert text in capsys.readouterr().err


def test_film_needs_matplotlib(run, monkeypatch):
    monkeypatch.setattr("flashkat_hf.training.run.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--film needs matplotlib: pip install 'flashkat_hf\[train\]'"):
        run(film=True)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_other_trackers_get_images_in_their_own_form(name, monkeypatch):
    """What accelerate's trackers are called with; the packages themselves are tried by hand."""
    sent = []

    class Tracker:
        def log(self, values, step):
            sent.append((values, step))

        log_images = log

    tracker = Tracker()
    tracker.name = name
    monkeypatch.setattr(
        pictures, "extra", lambda *names: type("trackio", (), {"Image": lambda image: ("trackio", image)})
    )
    maker = pictures.Pictures.__new__(pictures.Pictures)
    maker.accelerator = type("Accelerator", (), {"trackers": [tracker]})
    image = Image.new("RGB", (4, 4))
    maker._send(image, 7)
    assert sent == [({"functions": [image] if name == "wandb" else ("trackio", image)}, 7)]
