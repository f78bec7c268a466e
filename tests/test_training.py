"""The loop: what an update is, what a run leaves, how it ends, and what is refused before it starts."""

import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState
from data_helpers import write_shards
from safetensors.torch import load_file
from small_runs import losses, make_images, metrics, small_run
from transformers import AutoImageProcessor, AutoModelForImageClassification

from flashkat_hf import trainer as loop
from flashkat_hf.images import open_image
from flashkat_hf.loading import TrainBatches
from flashkat_hf.measurement import loading_rate
from flashkat_hf.recipe import Settings
from flashkat_hf.run_folder import CONTENTS
from flashkat_hf.trainer import Trainer, compile_mode
from flashkat_hf.training import train
from flashkat_hf.training_state import Checkpoints

SUMMARY = (
    "data num_train_images num_test_images num_labels image_size epochs steps batch_size top1 top5 top1_raw top1_ema "
    "weights best_epoch images_per_second data_images_per_second step_images_per_second peak_memory_gib device "
    "num_processes precision compiled started_from seed skipped_updates skipped_images seconds versions commit"
)


@pytest.fixture(autouse=True)
def _one_run(request, monkeypatch) -> Iterator[None]:
    """On the CPU unless marked, one thread, and all that a run seeds and sets put back."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(request.node.get_closest_marker("gpu") is None).lower())
    num_threads, states = torch.get_num_threads(), (random.getstate(), numpy.random.get_state())
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
    random.setstate(states[0])
    numpy.random.set_state(states[1])


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def run(images, tmp_path):
    """Train on the images, or what `data` says; the folder of the run."""

    def run(name: str = "run", **settings) -> Path:
        output = tmp_path / name
        values = {"data": images, **settings}
        callback = values.pop("on_model", None)
        try:
            train(small_run(values.pop("data"), output, **values), callback)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        return output

    return run


def weights(output: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(output / name / "model.safetensors")


def after_step(monkeypatch, step: int, action) -> None:
    """Call `action(trainer)` when a run has made update `step`."""
    update = Trainer._update

    def updated(trainer, batches) -> None:
        update(trainer, batches)
        if trainer.progress.step == step:
            action(trainer)

    monkeypatch.setattr(Trainer, "_update", updated)


def seen(monkeypatch, see) -> None:
    """Call `see(model, images, targets)` at each forward pass in training."""
    build = loop.build_model

    def built(settings, class_names):
        model, processor = build(settings, class_names)

        def before(module, _, given) -> None:
            if "labels" in given:
                see(module, given["pixel_values"], given["labels"])

        model.register_forward_pre_hook(before, with_kwargs=True)
        return model, processor

    monkeypatch.setattr(loop, "build_model", built)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_bar_says_where_a_run_stands(run, capsys):
    run()
    bar = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"100%\|.*\| 6/6 \[\d\d:\d\d<\d\d:\d\d, .*, loss \d\.\d{3}, lr \d\.\de-\d\d, \d+ images/s\]", bar
    ), bar


def test_what_a_run_leaves(run, images):
    output = run(ema_decay=0.5, micro_batch=4, seed=7)
    summary = json.loads((output / "summary.json").read_text())
    assert " ".join(summary) == SUMMARY
    told = {"data": str(images), "num_train_images": 24, "num_test_images": 6, "num_labels": 2, "image_size": 16}
    told |= {"epochs": 2, "steps": 6, "batch_size": 8, "device": "CPU", "num_processes": 1, "precision": "no"}
    told |= {"compiled": False, "started_from": None, "seed": 7, "peak_memory_gib": None, "skipped_updates": 0}
    assert {name: summary[name] for name in told} == told
    assert set(summary["versions"]) == {
        "python",
        "torch",
        "transformers",
        "accelerate",
        "timm",
        "triton",
        "flashkat_hf",
    }
    assert all(summary[name] > 0 for name in SUMMARY.split() if name.endswith("per_second"))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
    steps, epochs = ([line for line in lines if ("kind" in line) is kind] for kind in (True, False))
    assert all(set(line) == {"kind", "epoch", "step", "loss", "learning_rate"} for line in steps)
    names = {"epoch", "step", "loss", "learning_rate", "top1", "top5", "top1_ema", "top5_ema"}
    assert all(
        set(line) == names | {name for name in SUMMARY.split() if name.endswith("per_second")} for line in epochs
    )
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert epochs[1]["loss"] == pytest.approx(sum(line["loss"] for line in steps[3:]) / 3, rel=1e-12)
    best = epochs[summary["best_epoch"] - 1]
    assert (summary["top1_raw"], summary["top1_ema"]) == (best["top1"], best["top1_ema"])
    assert summary["top1"] == max(max(line["top1"], line["top1_ema"]) for line in epochs)
    assert {path.name for path in output.iterdir()} == CONTENTS - {"checkpoints", "samples", "logs"}
    for name in ("best", "last"):
        model = AutoModelForImageClassification.from_pretrained(output / name)
        assert model.config.id2label == {0: "green", 1: "red"}
        assert AutoImageProcessor.from_pretrained(output / name).crop_size["height"] == 16
    assert json.loads((output / "best" / "summary.json").read_text()) == summary
    last = json.loads((output / "last" / "summary.json").read_text())
    assert (last["top1"], last["weights"]) == (epochs[1]["top1"], "raw")
    settings = json.loads((output / "settings.json").read_text())
    assert (settings["seed"], settings["num_processes"], settings["class_names"]) == (7, 1, ["green", "red"])


def test_it_learns(run):
    """Two colours, so that a wrong sign, a frozen model or shuffled labels are seen."""
    output = run(epochs=6, learning_rate=3e-3)
    assert metrics(output)[-1]["top1"] == 1
    assert losses(output)[-1] < 0.4 < 0.5 < losses(output)[0]  # smoothing leaves 0.2


def test_the_best_model_is_kept_and_the_last_one_too(run, monkeypatch):
    """Accuracies made up: raw 0.5, 0.9, 0.7; averaged 0.6, 0.8, 0.7."""
    states, values = [], iter([0.5, 0.6, 0.9, 0.8, 0.7, 0.7])

    def evaluated(model, batches, accelerator):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"top1": next(values), "top5": 1.0, "count": 6}

    monkeypatch.setattr(loop, "evaluate", evaluated)
    written = []
    output = run(
        epochs=3, ema_decay=0.5, on_model=lambda folder: written.append((folder.name, sorted(os.listdir(folder))))
    )
    assert all(torch.equal(tensor, weights(output, "best")[name]) for name, tensor in states[2].items())
    assert all(torch.equal(tensor, weights(output, "last")[name]) for name, tensor in states[4].items())
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["top1"], summary["top1_ema"], summary["best_epoch"], summary["weights"]) == (0.9, 0.8, 2, "raw")
    assert [name for name, _ in written] == ["best", "best", "last"]
    complete = ["config.json", "model.safetensors", "preprocessor_config.json", "summary.json"]
    assert all(set(complete) <= set(found) for _, found in written)


def test_averaged_weights_may_be_the_best(run, monkeypatch):
    states, values = [], iter([0.5, 0.6, 0.5, 0.5])

    def evaluated(model, batches, accelerator):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"top1": next(values), "top5": 1.0, "count": 6}

    monkeypatch.setattr(loop, "evaluate", evaluated)
    output = run(ema_decay=0.5)
    assert all(torch.equal(tensor, weights(output, "best")[name]) for name, tensor in states[1].items())
    assert not all(torch.equal(tensor, weights(output, "best")[name]) for name, tensor in states[0].items())
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["top1"], summary["top1_raw"], summary["weights"]) == (0.6, 0.5, "ema")


def test_every_update_reaches_the_averaged_weights(run, monkeypatch):
    """With a decay of 0.5, by hand from the weights after each of six updates."""
    history, averages = [], []

    def note(trainer) -> None:
        history.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})

    for step in range(1, 7):
        after_step(monkeypatch, step, note)
    after_step(monkeypatch, 6, lambda trainer: averages.append(trainer.average.state_dict()))
    build = loop.build_model

    def built(settings, class_names):
        model, processor = build(settings, class_names)
        history.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return model, processor

    monkeypatch.setattr(loop, "build_model", built)
    run(ema_decay=0.5)
    expected, *updates = history
    assert len(updates) == 6
    for state in updates:
        expected = {name: 0.5 * tensor + 0.5 * state[name] for name, tensor in expected.items()}
    torch.testing.assert_close(averages[0], expected)


def test_micro_batches_and_accumulation_give_the_same_update(run):
    """To rounding: the gradient of a mean is the mean of the gradients. What is drawn for each sample stays its own.

    With a large eps: Adam would blow up the rounding where the gradient is 0, as of the keys' bias.
    """
    whole = run("whole", eps=0.1, learning_rate=3e-3)
    parts = run("parts", eps=0.1, learning_rate=3e-3, micro_batch=2)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=1e-4, atol=1e-6)


def test_batches_are_mixed_and_labels_with_them(run, monkeypatch):
    targets, inputs = [], []

    def see(model, images, labels) -> None:
        targets.append(labels.clone())
        inputs.append(images.clone())

    seen(monkeypatch, see)
    run("mixed", mixup=0.8, cutmix=1.0, label_smoothing=0.0)
    run("plain", label_smoothing=0.1)
    mixed, plain = torch.cat(targets[:6]), torch.cat(targets[6:])
    changed = (torch.cat(inputs[:6]) != torch.cat(inputs[6:])).flatten(1).any(1)
    assert changed[((mixed > 0.01) & (mixed < 0.99)).any(1)].all()
    assert ((mixed > 0.01) & (mixed < 0.99)).any(1).float().mean() > 0.2
    torch.testing.assert_close(plain.sort(1).values, torch.tensor([[0.05, 0.95]]).expand(48, 2))


def test_updates_differ_in_what_they_draw_and_runs_do_not(run, monkeypatch):
    inputs: list[torch.Tensor] = []
    seen(monkeypatch, lambda model, images, labels: inputs.append(images.clone()))
    first = run("first", mixup=0.8, drop_path=0.5)
    again = run("again", mixup=0.8, drop_path=0.5)
    other = run("other", mixup=0.8, drop_path=0.5, seed=1)
    assert losses(first) == losses(again) != losses(other)
    assert all(torch.equal(one, two) for one, two in zip(inputs[:6], inputs[6:12], strict=True))
    assert len({tensor.sum().item() for tensor in inputs}) == 12


def test_batches_made_in_the_background_change_nothing(run, monkeypatch):
    """As on a GPU; mixing and stochastic depth draw meanwhile. A run that stops in an epoch goes on alike."""
    options = {"epochs": 3, "workers": 1, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.5}
    plain = run("plain", **options)
    load = Trainer._load_data

    def load_for_the_background(trainer) -> None:
        load(trainer)
        trainer.in_background = True

    monkeypatch.setattr(Trainer, "_load_data", load_for_the_background)
    assert losses(run("ahead", **options)) == losses(plain)
    with monkeypatch.context() as patch:
        after_step(patch, 4, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run("resumed", **options)
    assert all(thread.name != "batches" for thread in threading.enumerate())
    resumed = run("resumed", **options, resume=True)
    assert losses(resumed) == losses(plain)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(plain).items())


def test_the_model_trains_in_training_mode_and_at_the_schedules_rate(run, monkeypatch):
    modes = []
    seen(monkeypatch, lambda model, images, labels: modes.append(model.training))
    output = run(epochs=4, warmup_epochs=1, schedule="epoch", warmup_learning_rate=1e-4, learning_rate=1e-3)
    assert modes == [True] * 12
    rates = [line["learning_rate"] for line in metrics(output) if "kind" in line]
    cosine = [5e-4 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (1, 2, 3)]
    assert rates == pytest.approx([rate for rate in [1e-4, *cosine] for _ in range(3)])


def test_the_groups_of_the_recipe_reach_the_optimiser(run, monkeypatch):
    groups = []
    after_step(monkeypatch, 1, lambda trainer: groups.append(trainer.optimizer.param_groups))
    run(weight_decay=0.2, beta2=0.95, eps=1e-6, layer_decay=0.5, max_steps=1)
    assert {group["weight_decay"] for group in groups[0]} == {0.0, 0.2}
    assert {group["lr_scale"] for group in groups[0]} == {0.5**power for power in range(6)}
    assert all((group["betas"], group["eps"]) == ((0.9, 0.95), 1e-6) for group in groups[0])


def test_coefficients_are_left_out_of_the_decay(run, monkeypatch):
    """Where the flag says so: of the decayed parameters those of numerators and denominators are missing."""
    decayed = []

    def count(trainer) -> None:
        groups = trainer.optimizer.param_groups
        decayed.append(sum(len(group["params"]) for group in groups if group["weight_decay"]))

    after_step(monkeypatch, 1, count)
    run("with", max_steps=1)
    output = run("without", max_steps=1, decay_coefficients=False)
    coefficients = [name for name in weights(output) if "numerator" in name or "denominator" in name]
    assert decayed[0] - decayed[1] == len(coefficients) > 0


def test_clipping(run, monkeypatch):
    """Before Adam, which hides a scale: the first moment after one update is a tenth of the gradient."""
    norms = []

    def note(trainer) -> None:
        moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
        norms.append(torch.nn.utils.get_total_norm(moments).item() * 10)

    after_step(monkeypatch, 1, note)
    run("free", max_steps=1)
    run("clipped", max_steps=1, clip_norm=0.01)
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_a_run_may_end_within_an_epoch(run):
    output = run(max_steps=4)
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["steps"], summary["epochs"]) == (4, 2)
    assert [line["step"] for line in metrics(output)] == [1, 2, 3, 3, 4, 4]


def test_evaluation_may_be_rarer(run):
    lines = [line for line in metrics(run(epochs=3, evaluate_epochs=2)) if "kind" not in line]
    assert ["top1" in line for line in lines] == [False, True, True]


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
        assert all(torch.equal(tensor, weights(stopped, name)[key]) for key, tensor in weights(whole, name).items())
    assert not checkpoint.exists()


def test_a_signal_at_the_last_update_leaves_the_evaluation_to_be_done(run, monkeypatch):
    whole = run("whole")
    with monkeypatch.context() as patch:
        after_step(patch, 6, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run("stopped")
    assert not whole.with_name("stopped").joinpath("last").exists()
    assert metrics(run("stopped", resume=True)) == metrics(whole)


def test_a_second_ctrl_c_does_not_wait(run, monkeypatch):
    after_step(monkeypatch, 2, lambda _: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        run()


def test_checkpoints_by_steps_and_by_time(run, monkeypatch):
    saved = []
    save = Trainer._save
    monkeypatch.setattr(Trainer, "_save", lambda trainer: saved.append(trainer.progress.step) or save(trainer))
    output = run("steps", checkpoint_steps=2, keep_checkpoints=5, keep_after_success=True)
    assert saved == [2, 4]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-2", "step-4"]
    saved.clear()
    run("minutes", checkpoint_minutes=1e-9)
    assert saved == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(run, monkeypatch, value):
    """The message names step, rate and checkpoint; the checkpoint is from before; --resume leaves the update out."""
    step = Trainer._update

    def spoilt(trainer, batches) -> None:
        if trainer.progress.step == 3:
            batches = iter([{**batch, "pixel_values": batch["pixel_values"] * value} for batch in [next(batches)]])
        step(trainer, batches)

    monkeypatch.setattr(Trainer, "_update", spoilt)
    settings = {"checkpoint_steps": 2, "log_steps": 100, "epochs": 3}
    with pytest.raises(
        ValueError, match=r"^the loss is nan at step 4, learning rate 0.000\d+; last good check\S+ \S+/step-2;"
    ):
        run("bad", **settings)
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"top1": 0.5, "top5": 1.0, "count": 6})
    output = run("bad", resume=True, skip_nonfinite=True, **settings)
    assert json.loads((output / "summary.json").read_text())["skipped_updates"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(output).values())
    lines = [line for line in metrics(output) if "kind" not in line]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_weights_that_are_not_finite_are_not_saved(run, monkeypatch):
    """Though no loss has shown it yet."""

    def spoil(trainer) -> None:
        trainer.model.classifier.bias.data[0] = math.inf

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
    """While best/ is written, or the first, or the second checkpoint; with more room the run goes on to the bit."""
    small_disk(kilobytes)
    settings = {"checkpoint_steps": 2, "epochs": 3}
    full = r"^[^\n]*(No space left on device|perhaps the disk is full)[^\n]*; last good checkpoint: (none|\S+/step-\d)$"
    with pytest.raises(OSError, match=full):
        run("disk/run", **settings)
    small_disk(20_000)
    assert metrics(run("disk/run", resume=True, **settings)) == metrics(run("whole", **settings))


def test_trackers_get_the_same_numbers(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = run(trackers=["tensorboard"])
    (events,) = {path.parent for path in (output / "logs").rglob("events*") if path.parent.name == "flashkat"}
    log = accumulator.EventAccumulator(str(events))
    log.Reload()
    assert [event.value for event in log.Scalars("train/loss")] == pytest.approx(losses(output), rel=1e-6)
    lines = [line for line in metrics(output) if "kind" not in line]
    assert [event.value for event in log.Scalars("epoch/top1")] == pytest.approx([line["top1"] for line in lines])


def test_without_matplotlib_a_run_warns_once_and_makes_no_pictures(run, monkeypatch, capsys):
    monkeypatch.setattr("flashkat_hf.run_folder.importlib.util.find_spec", lambda name: None)
    output = run(max_steps=1)
    assert capsys.readouterr().err.count("matplotlib is missing") == 1
    assert not list(output.glob("*.png"))
    assert (output / "summary.json").exists()


@pytest.mark.parametrize("others", [{"lora_rank": 2}, {"freeze_backbone": True}, {"gradient_checkpointing": True}])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_ways_to_fine_tune(run, others):
    """From a saved model, at another image size; what `from_pretrained` loads is what was evaluated."""
    start = run("start", max_steps=2)
    output = run("tuned", size=None, model=str(start / "best"), image_size=24, max_steps=2, ema_decay=0.5, **others)
    model = AutoModelForImageClassification.from_pretrained(output / "last")
    assert model.config.image_size == 24
    assert json.loads((output / "summary.json").read_text())["started_from"] == str(start / "best")
    moved = {
        name
        for name, tensor in weights(output).items()
        if "position" not in name and not torch.equal(tensor, weights(start, "best")[name])
    }
    if "freeze_backbone" in others:
        assert moved == {"classifier.weight", "classifier.bias"}
    else:
        assert {"flashkat.layers.0.mlp.act2.numerator", "flashkat.layers.3.attention.qkv.weight"} <= moved
        assert ("flashkat.layers.0.norm1.weight" in moved) is ("lora_rank" not in others)
    assert (output / "best" / "adapter").exists() is ("lora_rank" in others)


def test_an_existing_output_is_refused_and_kept(run):
    output = run(max_steps=1)
    before = contents(output)
    for message, settings in (
        (r"run exists; --resume goes on with it, --overwrite replaces it, or name another", {}),
        (r"--batch_size: 48 is more than the 24 training images", {"overwrite": True, "batch_size": 48}),
        (r"--model: .*nowhere is not a folder", {"overwrite": True, "size": None, "model": str(output / "nowhere")}),
    ):
        with pytest.raises(ValueError, match=message):
            run(**settings)
        assert contents(output) == before
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"run also holds what others wrote: notes.txt"):
        run(overwrite=True)
    (output / "notes.txt").unlink()
    run(max_steps=2, overwrite=True)
    assert json.loads((output / "summary.json").read_text())["steps"] == 2


def test_what_is_no_run_is_not_overwritten(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    for settings in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match="run exists"):
            run(**settings)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file exists and is not a folder"):
        run("file", overwrite=True)
    with pytest.raises(ValueError, match=r"--output: .*file/below cannot be made, .*file is not a folder"):
        run("file/below")


def test_an_output_that_cannot_be_written(run, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root, who may, runs the tests
    with pytest.raises(ValueError, match=r"--output: .*run cannot be made, .* is not a folder that can be written to"):
        run()


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
    monkeypatch.setattr(loop, "build_model", lambda *_: built.append(1))
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


def test_a_corrupt_image_ends_the_run_unless_told_otherwise(run, tmp_path, capsys):
    """Its header is whole, so that it is found only when it is decoded."""
    data = make_images(tmp_path / "photos")
    bad = data / "train" / "red" / "3.png"
    bad.write_bytes(bad.read_bytes()[:-200])
    with pytest.raises(ValueError, match=rf"cannot read the image {bad}: [^\n]*truncated[^\n]*$"):
        run("bad", data=data)
    summary = json.loads((run("skipped", data=data, skip_corrupt=True) / "summary.json").read_text())
    assert (summary["steps"], summary["skipped_images"]) == (6, 1)
    assert metrics(tmp_path / "skipped")[-1]["skipped_images"] == 1
    assert "left out: 1 images that could not be read" in capsys.readouterr().err


def damage_classes(root: Path) -> None:
    (root / "val" / "red").rename(root / "val" / "blue")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "val").rename(root / "test"), "val/ is missing"),
        (lambda root: [path.unlink() for path in (root / "train" / "red").iterdir()], "red has no images"),
        (lambda root: [(root / split / "red").rename(root / split[0]) for split in ("train", "val")], "only the class"),
        (damage_classes, "classes that"),
        (lambda root: (root / "train" / "red" / "1.png").write_text("no"), "cannot read the image .*1.png"),
    ],
)
def test_bad_data_is_refused_before_the_model_is_built(run, tmp_path, monkeypatch, damage, message):
    damage(make_images(tmp_path / "photos"))
    monkeypatch.setattr(loop, "build_model", None)
    with pytest.raises(ValueError, match=message) as caught:
        run(data=tmp_path / "photos")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 48}, "--batch_size: 48 is more than the 24 training images"),
        ({"micro_batch": 1, "cutmix": 1.0}, "--micro_batch: mixing pairs images"),
        ({"trackers": ["wandb"]}, "--trackers: wandb is missing: pip install wandb"),
    ],
)
def test_settings_that_do_not_serve_are_refused_before_the_model_is_built(
    run, tmp_path, monkeypatch, settings, message
):
    monkeypatch.setattr(loop, "build_model", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=message):
        run(**settings)
    assert not (tmp_path / "run").exists()


def test_a_precision_that_is_not_ours(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="--precision: fp8 is not supported, no or bf16 are"):
        run()


def test_training_is_in_mixed_precision_and_evaluation_is_not(run, monkeypatch):
    dtypes = []
    build = loop.build_model

    def built(settings, class_names):
        model, processor = build(settings, class_names)
        model.classifier.register_forward_hook(lambda *given: dtypes.append((model.training, given[2].dtype)))
        return model, processor

    monkeypatch.setattr(loop, "build_model", built)
    run(precision="bf16", max_steps=1)
    assert set(dtypes) == {(True, torch.bfloat16), (False, torch.float32)}


def test_a_compiled_run(run, monkeypatch):
    """The training pass goes through torch.compile; the result is the plain one's to rounding."""
    compiled = []
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *given, **named: compiled.append(1) or compile(*given, **named, backend="aot_eager")
    )
    output = run("compiled", compile=True, max_steps=3)
    assert compiled == [1]
    assert losses(output) == pytest.approx(losses(run("plain", max_steps=3)), rel=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_a_run_is_compiled_in_bfloat16_and_measured(run):
    output = run(max_steps=3, ema_decay=0.5, mixup=0.8)
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["precision"], summary["compiled"], summary["device"]) == (
        "bf16",
        True,
        torch.cuda.get_device_name(),
    )
    assert summary["peak_memory_gib"] > 0
    assert 0 < summary["images_per_second"] <= summary["step_images_per_second"] * 1.01
    plain = run("plain", max_steps=3, ema_decay=0.5, mixup=0.8, compile=False)
    assert losses(output) == pytest.approx(losses(plain), rel=0.05)


def test_cuda_graphs_where_they_serve():
    """Gradients that accumulate would be overwritten by the next replay."""

    def mode(device="cuda", kind=DistributedType.NO, accumulate=1, **settings) -> str | None:
        accelerator = SimpleNamespace(device=torch.device(device), distributed_type=kind)
        return compile_mode(Settings(**settings), accelerator, accumulate)  # pyright: ignore[reportArgumentType]

    assert mode() == mode(kind=DistributedType.MULTI_GPU) == "reduce-overhead"
    assert mode("cpu") is mode(kind=DistributedType.FSDP) is mode(accumulate=2) is mode(cuda_graphs=False) is None


@pytest.mark.gpu
def test_cuda_graphs_give_the_bits_of_launches(run, monkeypatch):
    """After a resume too."""
    settings = {"epochs": 3, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.3, "ema_decay": 0.8}
    launched = run("launched", **settings, cuda_graphs=False)
    with monkeypatch.context() as patch:
        after_step(patch, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run("replayed", **settings)
    replayed = run("replayed", resume=True, **settings)
    assert losses(replayed) == losses(launched)
    assert all(torch.equal(tensor, weights(replayed)[name]) for name, tensor in weights(launched).items())


def test_the_digits_leave_samples(run):
    output = run("digits", data="digits", max_steps=1, batch_size=16)
    samples = sorted((output / "samples").iterdir())
    assert [path.name[:2] for path in samples] == [f"{digit}_" for digit in range(10)]
    assert open_image(samples[3]).size == (8, 8)


def test_the_data_side_is_measured_once_all_workers_give(monkeypatch):
    """Two workers: the first comes after 5 s, and then they give 4 images every other second."""
    times = iter([5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    monkeypatch.setattr("flashkat_hf.measurement.time", SimpleNamespace(perf_counter=lambda: next(times)))
    batches = [{"labels": torch.zeros(4)}] * 6
    assert loading_rate(iter(batches), workers=2, seconds=2.5) == 4.0  # batches 3 to 5, from second 6 to 9
    times = iter([5.0, 6.0, 7.0])
    assert loading_rate(iter(batches[:3]), workers=2) is None
