"""The loop: what an update is, what a run leaves, how it ends, and what is refused before it starts."""

import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import micro_config
from safetensors.torch import load_file
from small_runs import after_step, losses, metrics, weights
from transformers import AutoImageProcessor, AutoModelForImageClassification

from flashkat_hf import FlashKATForImageClassification, make_image_processor
from flashkat_hf.cli import main
from flashkat_hf.data.augmentation import evaluation_transform
from flashkat_hf.data.batches import EvalBatches, TrainBatches
from flashkat_hf.data.samples import open_image
from flashkat_hf.data.sources import open_data
from flashkat_hf.training import run as assembly
from flashkat_hf.training import trainer as loop
from flashkat_hf.training.evaluation import evaluate
from flashkat_hf.training.feed import Feed
from flashkat_hf.training.initial_model import build_model, save_model
from flashkat_hf.training.output import CONTENTS
from flashkat_hf.training.recipe import Settings
from flashkat_hf.training.speed import loading_rate

SUMMARY = (
    "data num_train_images num_test_images evaluated_on epoch_chosen num_selection_images selection_top1 "
    "num_labels image_size epochs steps batch_size top1 top5 top1_raw top1_ema weights best_epoch "
    "images_per_second data_images_per_second step_images_per_second peak_memory_gib device num_processes "
    "precision compiled started_from seed skipped_updates skipped_images seconds versions commit"
)


def seen(monkeypatch, see) -> None:
    """Call `see(model, images, targets)` at each forward pass in training."""
    build = assembly.build_model

    def built(settings, class_names):
        model, processor = build(settings, class_names)

        def before(module, _, given) -> None:
            if "labels" in given:
                see(module, given["pixel_values"], given["labels"])

        model.register_forward_pre_hook(before, with_kwargs=True)
        return model, processor

    monkeypatch.setattr(assembly, "build_model", built)


def test_the_bar_says_where_a_run_stands(run, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run()
    bar = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"100%\|.*\| 6/6 \[\d\d:\d\d<\d\d:\d\d, .*, loss \d\.\d{3}, lr \d\.\de-\d\d, \d+ images/s\]", bar
    ), bar


def test_what_a_run_leaves(run, images):
    output = run(ema_decay=0.5, micro_batch=4, seed=7)
    summary = json.loads((output / "summary.json").read_text())
    assert " ".join(summary) == SUMMARY
    told = {
        "data": str(images),
        "num_train_images": 24,
        "num_test_images": 6,
        "evaluated_on": "test images",
        "epoch_chosen": "on test images",
        "num_selection_images": 6,
        "selection_top1": summary["top1"],
        "num_labels": 2,
        "image_size": 16,
    }
    told |= {"epochs": 2, "steps": 6, "batch_size": 8, "device": "CPU", "num_processes": 1, "precision": "no"}
    told |= {
        "compiled": False,
        "started_from": None,
        "seed": 7,
        "peak_memory_gib": None,
        "skipped_updates": 0,
    }
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
        set(line) == names | {name for name in SUMMARY.split() if name.endswith("per_second")}
        for line in epochs
    )
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert epochs[1]["loss"] == pytest.approx(sum(line["loss"] for line in steps[3:]) / 3, rel=1e-12)
    best = epochs[summary["best_epoch"] - 1]
    assert (summary["top1_raw"], summary["top1_ema"]) == (best["top1"], best["top1_ema"])
    assert summary["top1"] == max(max(line["top1"], line["top1_ema"]) for line in epochs)
    others = {"checkpoints", "samples", "logs", "functions.gif", "functions.jsonl"}
    assert {path.name for path in output.iterdir()} == CONTENTS - others
    for name in ("best", "last"):
        model = AutoModelForImageClassification.from_pretrained(output / name)
        assert model.config.id2label == {0: "green", 1: "red"}
        assert AutoImageProcessor.from_pretrained(output / name).crop_size["height"] == 16
    of_weights = {
        "weights_sha256": hashlib.sha256((output / "best/model.safetensors").read_bytes()).hexdigest()
    }
    assert json.loads((output / "best" / "summary.json").read_text()) == summary | of_weights
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

    def evaluated(model, batches, accelerator, scores, **_):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"top1": next(values), "top5": 1.0, "count": 6}

    monkeypatch.setattr(loop, "measure", evaluated)
    written = []
    output = run(
        epochs=3,
        ema_decay=0.5,
        on_model=lambda folder: written.append((folder.name, sorted(os.listdir(folder)))),
    )
    assert all(torch.equal(tensor, weights(output, "best")[name]) for name, tensor in states[2].items())
    assert all(torch.equal(tensor, weights(output, "last")[name]) for name, tensor in states[4].items())
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["top1"], summary["top1_ema"], summary["best_epoch"], summary["weights"]) == (
        0.9,
        0.8,
        2,
        "raw",
    )
    assert [name for name, _ in written] == ["best", "best", "last"]
    complete = ["config.json", "model.safetensors", "preprocessor_config.json", "summary.json"]
    assert all(set(complete) <= set(found) for _, found in written)


def test_averaged_weights_may_be_the_best(run, monkeypatch):
    states, values = [], iter([0.5, 0.6, 0.5, 0.5])

    def evaluated(model, batches, accelerator, scores, **_):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"top1": next(values), "top5": 1.0, "count": 6}

    monkeypatch.setattr(loop, "measure", evaluated)
    output = run(ema_decay=0.5)
    assert all(torch.equal(tensor, weights(output, "best")[name]) for name, tensor in states[1].items())
    assert not all(torch.equal(tensor, weights(output, "best")[name]) for name, tensor in states[0].items())
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["top1"], summary["top1_raw"], summary["weights"]) == (0.6, 0.5, "ema")


def test_every_update_reaches_the_averaged_weights(run, monkeypatch):
    """With a decay of 0.5, by hand from the weights after each of six updates."""
    history, averages = [], []

    def note(trainer) -> None:
        history.append({name: tensor.clone() for name, tensor in trainer.model.module.state_dict().items()})

    for step in range(1, 7):
        after_step(monkeypatch, step, note)
    after_step(monkeypatch, 6, lambda trainer: averages.append(trainer.model.average.state_dict()))
    build = assembly.build_model

    def built(settings, class_names):
        model, processor = build(settings, class_names)
        history.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return model, processor

    monkeypatch.setattr(assembly, "build_model", built)
    run(ema_decay=0.5)
    expected, *updates = history
    assert len(updates) == 6
    for state in updates:
        expected = {name: 0.5 * tensor + 0.5 * state[name] for name, tensor in expected.items()}
    torch.testing.assert_close(averages[0], expected)


def test_micro_batches_and_accumulation_give_the_same_update(run):
    """To rounding: the gradient of a mean is the mean of the gradients.

    What is drawn for each sample stays its own.

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
    monkeypatch.setattr(Feed, "in_background", property(lambda _: True, lambda *_: None), raising=False)
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
    after_step(monkeypatch, 1, lambda trainer: groups.append(trainer.model.optimizer.param_groups))
    run(weight_decay=0.2, beta2=0.95, eps=1e-6, layer_decay=0.5, max_steps=1)
    assert {group["weight_decay"] for group in groups[0]} == {0.0, 0.2}
    assert {group["lr_scale"] for group in groups[0]} == {0.5**power for power in range(6)}
    assert all((group["betas"], group["eps"]) == ((0.9, 0.95), 1e-6) for group in groups[0])


def test_coefficients_are_left_out_of_the_decay(run, monkeypatch):
    """Where the flag says so: of the decayed parameters those of numerators and denominators are missing."""
    decayed = []

    def count(trainer) -> None:
        groups = trainer.model.optimizer.param_groups
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
        moments = [state["exp_avg"] for state in trainer.model.optimizer.state.values()]
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


def test_trackers_get_the_same_numbers(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = run(trackers=["tensorboard"])
    (events,) = {path.parent for path in (output / "logs").rglob("events*") if path.parent.name == "flashkat"}
    log = accumulator.EventAccumulator(str(events))
    log.Reload()
    assert [event.value for event in log.Scalars("train/loss")] == pytest.approx(losses(output), rel=1e-6)
    lines = [line for line in metrics(output) if "kind" not in line]
    assert [event.value for event in log.Scalars("epoch/top1")] == pytest.approx(
        [line["top1"] for line in lines]
    )


def test_without_matplotlib_a_run_warns_once_and_makes_no_pictures(run, monkeypatch, capsys):
    monkeypatch.setattr("flashkat_hf.training.run_folder.importlib.util.find_spec", lambda name: None)
    output = run(max_steps=1)
    assert capsys.readouterr().err.count("matplotlib is missing") == 1
    assert not list(output.glob("*.png"))
    assert (output / "summary.json").exists()


@pytest.mark.parametrize(
    "others", [{"lora_rank": 2}, {"freeze_backbone": True}, {"gradient_checkpointing": True}]
)
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft 0.21 asks for it
def test_ways_to_fine_tune(run, others):
    """From a saved model, at another image size; what `from_pretrained` loads is what was evaluated."""
    start = run("start", max_steps=2)
    output = run(
        "tuned", size=None, model=str(start / "best"), image_size=24, max_steps=2, ema_decay=0.5, **others
    )
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


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["patch_embeddings"], r"flashkat\.embeddings\.patch_embeddings\.weight"),
        (["all-linear"], r".*\.(qkv|proj|fc1|fc2)\.weight"),
    ],
)
def test_low_ranks_of_other_maps(run, modules, expected):
    """Of the patches' projection, and of every linear map; beside them rationals and head learn in full."""
    pytest.importorskip("peft")
    start = run("start", max_steps=1)
    output = run(size=None, model=str(start / "best"), lora_rank=2, lora_modules=modules, learning_rate=1e-2)
    before, after = weights(start, "best"), weights(output)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    in_full = {name for name in after if re.search(r"act[12]\.|classifier\.", name)}
    assert moved - in_full == {name for name in after if re.fullmatch(expected, name)}
    assert {name for name in in_full if "denominator" not in name} <= moved
    changes = [after[name] - before[name] for name in moved - in_full]
    assert max(torch.linalg.matrix_rank(change.flatten(1), rtol=1e-3) for change in changes) <= 2
    AutoModelForImageClassification.from_pretrained(output / "last")


@pytest.fixture
def bfloat16(tmp_path, images) -> str:
    """A checkpoint of three labels whose file is in bfloat16."""
    folder = tmp_path / "bfloat16"
    model, processor = build_model(Settings(data=str(images), size="micro"), ["green", "red", "blue"])
    save_model(model.to(torch.bfloat16), processor, folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("others", "trained"),
    [
        ({}, ""),
        ({"freeze_backbone": True}, "classifier"),
        ({"lora_rank": 2}, "(act|classifier|qkv.weight|proj.weight|fc.*weight)"),
        ({"ema_decay": 0.5}, ""),
    ],
    ids=["all", "frozen", "lora", "averaged"],
)
def test_weights_of_a_bfloat16_checkpoint_all_learn(run, bfloat16, others, trained):
    """In float32, in which they are saved: AdamW's steps are smaller than bfloat16's rounding."""
    before = load_file(f"{bfloat16}/model.safetensors")
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16}
    output = run(size=None, model=bfloat16, learning_rate=1e-4, **others)
    after = weights(output)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert after["classifier.weight"].shape == (2, 64)
    names = [name for name in after if re.search(trained, name) and not name.startswith("classifier")]
    changed = [(after[name] != before[name].float()).flatten() for name in names]
    assert not changed or torch.cat(changed).float().mean() > 0.99
    assert json.loads((output / "last" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("others", [{}, {"ema_decay": 0.5}], ids=["raw", "averaged"])
def test_what_is_saved_in_half_precision_is_what_was_evaluated(run, images, others):
    output = run(save_dtype="bfloat16", learning_rate=3e-3, **others)
    whole = run("whole", learning_rate=3e-3, **others)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(output)[name], tensor.to(torch.bfloat16)), name
    model = AutoModelForImageClassification.from_pretrained(output / "last")
    assert model.dtype == torch.bfloat16
    data, processor = open_data(images), AutoImageProcessor.from_pretrained(output / "last")
    batches = EvalBatches(data.test, evaluation_transform(processor), batch_size=8)
    result = evaluate(model, batches, Accelerator(cpu=True))
    assert result["top1"] == json.loads((output / "last" / "summary.json").read_text())["top1_raw"]


def test_the_digits_leave_samples(run):
    output = run("digits", data="digits", max_steps=1, batch_size=16)
    samples = sorted((output / "samples").iterdir())
    assert [path.name[:2] for path in samples] == [f"{digit}_" for digit in range(10)]
    assert open_image(samples[3]).size == (8, 8)


def test_a_run_says_what_it_does(run, capsys, images):
    output = run(workers=1, micro_batch=4, freeze_backbone=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"data: {images}, 24 images to train on, 6 to test, 2 classes (green, red)"
    parameters = sum(tensor.numel() for tensor in weights(output).values())
    model = f"a fresh micro FlashKAT, {parameters:,} parameters, of which 130 learn, images of 16x16 pixels"
    assert lines[1:7] == [
        "--holdout 0: the epoch is chosen on the test images",
        f"model: {model}",
        "device: 1 x CPU, float32, 1 workers each",
        "training: 6 updates (2 epochs of 3), 8 images each (1 x 2 x 4)",
        f"output: {output}",
        "reading the first images",
    ]
    assert [line[:22] for line in lines[7:]] == ["epoch 1: test accuracy", "epoch 2: test accuracy"]


def test_the_batches_that_are_measured_are_trained_on(run, monkeypatch):
    """None is made twice, and the run is the same."""
    made, begun = [], []
    epoch = TrainBatches.epoch

    def noted(self, *at):
        begun.append(at)
        for batch in epoch(self, *at):
            made.append(batch["labels"])
            yield batch

    plain = run("plain")
    monkeypatch.setattr(TrainBatches, "epoch", noted)
    measured = run("measured", workers=2)
    assert not multiprocessing.active_children()
    assert (len(made), begun) == (6, [(0, 0), (1, 0)])
    assert losses(measured) == losses(plain)


def test_a_run_that_fails_ends_its_workers(run):
    with pytest.raises(ValueError, match="the loss is nan") as failure:  # keeps the frames, and so the loader
        run(workers=2, learning_rate=1e30)
    assert not multiprocessing.active_children(), failure


def test_the_data_side_is_measured_once_all_workers_give(monkeypatch):
    """Two workers: the first comes after 5 s, and then they give 4 images every other second."""
    times = iter([5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    monkeypatch.setattr("flashkat_hf.training.speed.time", SimpleNamespace(perf_counter=lambda: next(times)))
    batches = [{"labels": torch.zeros(4)}] * 6
    assert loading_rate(iter(batches), workers=2, seconds=2.5) == 4.0  # batches 3 to 5, from second 6 to 9
    times = iter([5.0, 6.0, 7.0])
    assert loading_rate(iter(batches[:3]), workers=2) is None
    times = iter([5.0, 9.0, 16.0])
    assert loading_rate(iter(batches), workers=2) is None  # it takes too long to wait for


def test_a_one_channel_model_learns_from_colour_images(run, images, tmp_path, capsys):
    """As converted from a one-channel ViT: trained, evaluated and asked, by the commands."""
    FlashKATForImageClassification(micro_config(num_channels=1)).save_pretrained(tmp_path / "grey")
    make_image_processor(32, num_channels=1).save_pretrained(tmp_path / "grey")
    output = run(model=str(tmp_path / "grey"), size=None, epochs=1)
    assert json.loads((output / "best/config.json").read_text())["num_channels"] == 1
    assert main(["evaluate", str(output / "best"), "--data", str(images), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["top1"] == json.loads((output / "summary.json").read_text())["top1"]
    assert main(["classify", str(output / "best"), str(images / "val/red/0.png")]) == 0
    FlashKATForImageClassification(micro_config(num_channels=4)).save_pretrained(tmp_path / "four")
    make_image_processor(32, num_channels=4).save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match=r"^--model: .*four takes images of 4 channels, but image files"):
        run("other", model=str(tmp_path / "four"), size=None)
