"""What a run refuses, in one line and before the model is built.

Outputs, data and settings that do not serve.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from helpers import micro_config
from small_runs import contents, make_images, metrics

from flashkat_hf import FlashKATForImageClassification, make_image_processor
from flashkat_hf.training import run as assembly


def test_an_existing_output_is_refused_and_kept(run):
    output = run(max_steps=1)
    before = contents(output)
    for message, settings in (
        (r"run exists; --resume goes on with it, --overwrite replaces it, or name another", {}),
        (r"--batch_size: 48 is more than the 24 training images", {"overwrite": True, "batch_size": 48}),
        (
            r"--model: .*nowhere is not a folder",
            {"overwrite": True, "size": None, "model": str(output / "nowhere")},
        ),
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
    with pytest.raises(
        ValueError, match=r"--output: .*run cannot be made, .* is not a folder that can be written to"
    ):
        run()


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
    other = data / "val" / "green" / "1.png"  # seen once, at the end
    other.write_bytes(other.read_bytes()[:-200])
    twice = run("twice", data=data, skip_corrupt=True, holdout=0.25) / "summary.json"
    assert json.loads(twice.read_text())["skipped_images"] == 2


def damage_classes(root: Path) -> None:
    (root / "val" / "red").rename(root / "val" / "blue")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "val").rename(root / "held_out"), "val/ is missing"),
        (lambda root: [path.unlink() for path in (root / "train" / "red").iterdir()], "red has no images"),
        (
            lambda root: [(root / split / "red").rename(root / split[0]) for split in ("train", "val")],
            "only the class",
        ),
        (damage_classes, "classes that"),
        (lambda root: (root / "train" / "red" / "1.png").write_text("no"), "cannot read the image .*1.png"),
    ],
)
def test_bad_data_is_refused_before_the_model_is_built(run, tmp_path, monkeypatch, damage, message):
    damage(make_images(tmp_path / "photos"))
    monkeypatch.setattr(assembly, "build_model", None)
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
    monkeypatch.setattr(assembly, "build_model", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=message):
        run(**settings)
    assert not (tmp_path / "run").exists()


def test_a_precision_that_is_not_ours(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="--precision: fp8 is not supported, no or bf16 are"):
        run()


def test_a_model_with_one_output(run, monkeypatch):
    """It does regression, and no data of a run have such labels."""
    model = FlashKATForImageClassification(micro_config(num_labels=1))
    monkeypatch.setattr(assembly, "build_model", lambda *_: (model, make_image_processor(32)))
    with pytest.raises(ValueError, match="the model has 1 outputs, but the data 2 classes"):
        run()
