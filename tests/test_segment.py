"""examples/segment.py: the command as a user calls it, with two steps; its numbers; and bad folders."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate import Accelerator
from helpers import ROOT, micro_config
from PIL import Image
from safetensors.torch import load_file
from small_runs import after_step
from transformers import UperNetForSemanticSegmentation

from flashkat_hf import FlashKATForImageClassification
from flashkat_hf.data.samples import DataError, Sample
from flashkat_hf.training import train

sys.path.append(str(ROOT / "examples"))
import segment
from two_backbones import read_flags, whole_image_processor


def make_folder(folder, classes: str | None = "nothing\nleft\n"):
    """Write images whose left half is class 1, in both splits."""
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(4):
            pixels = numpy.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype="uint8")
            mask = numpy.zeros((40, 60), dtype="uint8")
            mask[:, :30], mask[:2] = 1, 255
            Image.fromarray(pixels).save(folder / split / f"images/{number}.jpg")
            Image.fromarray(mask).save(folder / split / f"masks/{number}.png")
    if classes:
        (folder / "classes.txt").write_text(classes)
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "examples/segment.py", *arguments]
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command(tmp_path):
    """From a checkpoint, on a folder: both models are saved, scored and drawn, and a run goes on."""
    data, model, output = make_folder(tmp_path / "data"), tmp_path / "model", tmp_path / "out"
    FlashKATForImageClassification(micro_config(num_hidden_layers=4)).save_pretrained(model)
    arguments = ["--max_steps", 2, "--batch_size", 2, "--ema_decay", 0.5, "--workers", 0, "--data", data]
    arguments += ["--model", model, "--image_size", 48, "--head_size", 16, "--output", output]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert summary.keys() == {"flashkat", "vit"}
    assert summary["flashkat"]["iou"].keys() == {"nothing", "left"}
    assert f"flashkat: mean IoU {summary['flashkat']['mean_iou']:.1%}" in done.stdout
    own = json.loads((output / "flashkat/best/summary.json").read_text())
    assert own["mean_iou"] == max(own["mean_iou_raw"], own["mean_iou_ema"])
    assert own["mean_iou"] == pytest.approx(summary["flashkat"]["mean_iou"])  # best/ is what was measured
    assert "mean_iou_ema" in (output / "vit/metrics.jsonl").read_text()
    loaded = UperNetForSemanticSegmentation.from_pretrained(output / "flashkat/best")
    assert type(loaded.backbone).__name__ == "FlashKATBackbone"
    assert loaded.config.id2label == {0: "nothing", 1: "left"}
    with Image.open(output / "masks.png") as picture:
        assert picture.width > 400
    again = run(*arguments, "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("is complete; nothing is left to do") == 2


def settings(*arguments: object):
    return read_flags(segment.Flags, "", [*map(str, arguments)])


def test_a_run_of_masks_resumes_to_the_bit(tmp_path, monkeypatch):
    """Stopped in the middle of an epoch and taken up again, its weights are those of a whole run."""
    data = make_folder(tmp_path / "data")

    def train_once(name: str, *others: str) -> dict:
        flags, given = settings("--data", data, "--output", tmp_path / name, "--image_size", 24, *others)
        build = partial(segment.build, flags)
        train(given, task=segment.Segmentation(), build=lambda *parts: build(*parts, "flashkat"))
        return load_file(tmp_path / name / "last/model.safetensors")

    numbers = ["--batch_size", "2", "--epochs", "2", "--workers", "0", "--head_size", "16", "--flip", "0.5"]
    whole = train_once("whole", *numbers)
    after_step(monkeypatch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        train_once("again", *numbers)
    assert stopped.value.code == 143
    resumed = train_once("again", *numbers, "--resume")
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_image_and_mask_are_mirrored_together(tmp_path):
    processor = whole_image_processor(48)
    pixels, mask = numpy.zeros((48, 48, 3), "uint8"), numpy.zeros((48, 48), "uint8")
    pixels[:, :20], mask[:, :20] = 255, 1
    sample = Sample(Image.fromarray(pixels), Image.fromarray(mask), "one")
    seen = set()
    for flip in (0.0, 1.0):
        item = segment.MaskedImage(processor, flip)(sample)
        bright = (item["pixel_values"] > 0).all(0)
        assert torch.equal(bright, item["labels"] == 1)
        assert item["labels"].dtype == torch.int64
        seen.add(bright[0, 0].item())
    assert seen == {True, False}


def test_weights_of_the_checkpoint_are_taken(tmp_path):
    classifier = FlashKATForImageClassification(micro_config(num_hidden_layers=4))
    classifier.save_pretrained(tmp_path / "model")
    flags, given = settings("--model", tmp_path / "model", "--image_size", 48)
    backbone = segment.build(flags, given, ["a", "b"], "flashkat")[0].backbone
    for name, parameter in classifier.flashkat.named_parameters():
        assert torch.equal(backbone.flashkat.get_parameter(name), parameter)
    twin = segment.build(flags, given, ["a", "b"], "vit")[0]
    assert twin.backbone.config.hidden_size == 64
    assert [name for name, _ in twin.decode_head.named_parameters()] == [
        name
        for name, _ in segment.build(flags, given, ["a", "b"], "flashkat")[0].decode_head.named_parameters()
    ]


def test_made_up_scenes():
    """The same each time; the shapes are where the masks say, and of both halves none is shared."""
    first, again = (segment.make_scenes(8, 0) for _ in range(2))
    assert first.fingerprint == again.fingerprint != segment.make_scenes(8, 1).fingerprint
    for image, mask, _ in first.train:
        assert image.size == mask.size == (48, 48)
        assert 0 < (numpy.array(mask) > 0).mean() < 0.5
    assert len(first.test) == 2
    assert not any(
        numpy.array_equal(image, other) for image in first.train.images for other in first.test.images
    )


def test_iou():
    """Two classes by hand; what is ignored does not count."""
    labels = torch.tensor([[[0, 0, 1, 1], [1, 255, 255, 0]]])
    predictions = torch.tensor([[[0, 1, 1, 0], [1, 1, 0, 0]]])
    scores = segment.MeanIoU(Accelerator(cpu=True), ["a", "b", "never"])
    logits = torch.nn.functional.one_hot(predictions, 3).permute(0, 3, 1, 2)
    scores.add(SimpleNamespace(logits=logits), labels)
    result = scores.result()
    assert result.pop("iou") == {"a": 2 / 4, "b": 2 / 4}
    assert result == {"mean_iou": 0.5, "pixels": pytest.approx(4 / 6), "count": 1}


def without_mask(folder):
    (folder / "train/masks/2.png").unlink()


def other_size(folder):
    Image.new("L", (40, 60)).save(folder / "val/masks/1.png")


def unknown_value(folder):
    Image.new("L", (60, 40), 7).save(folder / "val/masks/1.png")


def colours(folder):
    Image.new("RGB", (60, 40)).save(folder / "train/masks/1.png")


def damaged(folder):
    (folder / "train/images/1.jpg").write_bytes(b"no image")


def no_split(folder):
    (folder / "val").rename(folder / "test")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_mask, r"images/2\.jpg has no mask .*masks/2\.png"),
        (other_size, r"val/masks/1\.png has 40x60 pixels, but its image 60x40"),
        (unknown_value, r"val/masks/1\.png has the value 7, but classes\.txt names 2 classes"),
        (colours, r"train/masks/1\.png has the mode RGB; a mask has one byte a pixel"),
        (damaged, r"train/masks/1\.png or its image cannot be read"),
        (no_split, "val/images is not a folder"),
    ],
)
def test_bad_folders(spoil, message, tmp_path):
    folder = make_folder(tmp_path / "data")
    spoil(folder)
    with pytest.raises(DataError, match=message) as error:
        segment.read_folder(folder)
    assert "\n" not in str(error.value)


def test_bad_settings(tmp_path):
    """In one line, before anything learns."""
    with pytest.raises(ValueError, match="--head_size: 0 must be positive"):
        settings("--head_size", 0)
    with pytest.raises(ValueError, match="unknown arguments: --epoch 3; perhaps --epochs"):
        settings("--epoch", 3)
    flags, given = settings("--image_size", 50)
    with pytest.raises(ValueError, match="--image_size: image_size must be a multiple of patch_size"):
        segment.build(flags, given, ["a"], "flashkat")
    flags, given = settings("--model", tmp_path / "none")
    with pytest.raises(ValueError, match="--model: "):
        segment.build(flags, given, ["a"], "flashkat")
    _, given = settings("--mixup", 0.2, "--output", tmp_path / "out")
    with pytest.raises(ValueError, match=r"--mixup: 0\.2 means nothing for Segmentation"):
        train(given, task=segment.Segmentation(8))
    done = run("--data", tmp_path / "none", "--output", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"segment.py: --data: {tmp_path}/none/train/images is not a folder")
    assert not (tmp_path / "out").exists()
