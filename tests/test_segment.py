"""examples/segment.py: the command as a user calls it, with two steps; its numbers; and bad folders."""

import json
import subprocess
import sys

import numpy
import pytest
import torch
from helpers import ROOT, micro_config
from PIL import Image
from transformers import UperNetForSemanticSegmentation

from flashkat_hf import FlashKATForImageClassification

sys.path.append(str(ROOT / "examples"))
import segment


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


def test_the_command(tmp_path):
    """From a checkpoint, on a folder: both models are saved, scored and drawn."""
    data, model = make_folder(tmp_path / "data"), tmp_path / "model"
    FlashKATForImageClassification(micro_config(num_hidden_layers=4)).save_pretrained(model)
    command = [sys.executable, str(ROOT / "examples/segment.py"), "--max_steps", "2", "--batch_size", "2"]
    command += ["--data", data, "--model", model, "--image_size", "48", "--output", tmp_path / "out"]
    done = subprocess.run(
        [*map(str, command), "--head_size", "16"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary.keys() == {"flashkat", "vit"}
    assert {"iou nothing", "iou left", "mean_iou", "accuracy"} <= summary["flashkat"].keys()
    assert f"flashkat: mean IoU {summary['flashkat']['mean_iou']:.1%}" in done.stdout
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "out/flashkat")
    assert type(loaded.backbone).__name__ == "FlashKATBackbone"
    assert loaded.config.id2label == {0: "nothing", 1: "left"}
    with Image.open(tmp_path / "out/masks.png") as picture:
        assert picture.width > 400


def test_weights_of_the_checkpoint_are_taken(tmp_path):
    classifier = FlashKATForImageClassification(micro_config(num_hidden_layers=4))
    classifier.save_pretrained(tmp_path / "model")
    settings = segment.Settings(model=str(tmp_path / "model"), image_size=48, output=tmp_path / "out")
    backbone = segment.build(settings, "flashkat", ["a", "b"]).backbone
    for name, parameter in classifier.flashkat.named_parameters():
        assert torch.equal(backbone.flashkat.get_parameter(name), parameter)
    twin = segment.build(settings, "vit", ["a", "b"])
    assert twin.backbone.config.hidden_size == 64
    assert [name for name, _ in twin.decode_head.named_parameters()] == [
        name for name, _ in segment.build(settings, "flashkat", ["a", "b"]).decode_head.named_parameters()
    ]


def test_made_up_scenes():
    """The same each time; the shapes are where the masks say, and of both halves none is shared."""
    (first, again), (val, _) = (segment.make_scenes(8, 0)[:2] for _ in range(2))
    for (image, mask), (image_again, mask_again) in zip(first, val, strict=True):
        assert numpy.array_equal(image, image_again)
        assert numpy.array_equal(mask, mask_again)
        assert image.shape == (48, 48, 3)
        assert 0 < (mask > 0).mean() < 0.5
    assert len(again) == 2
    assert not any(numpy.array_equal(image, other) for image, _ in first for other, _ in again)


def test_iou():
    """Two classes by hand; what is ignored does not count."""
    labels = numpy.array([[[0, 0, 1, 1], [1, 255, 255, 0]]])
    predictions = numpy.array([[[0, 1, 1, 0], [1, 1, 0, 0]]])
    outputs = type("Outputs", (), {"label_ids": labels, "predictions": predictions})
    scores = segment.scores(outputs, ["a", "b", "never"])
    assert scores == {"iou a": 2 / 4, "iou b": 2 / 4, "mean_iou": 0.5, "accuracy": 4 / 6}


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
    with pytest.raises(SystemExit, match=message) as error:
        segment.read_folder(folder)
    assert "\n" not in str(error.value)


def test_bad_settings(tmp_path):
    with pytest.raises(SystemExit, match="--batch_size: 0 must be positive"):
        segment.Settings(batch_size=0)
    with pytest.raises(SystemExit, match="exists; --overwrite true"):
        segment.Settings(output=tmp_path)
    settings = segment.Settings(image_size=50, output=tmp_path / "out")
    with pytest.raises(SystemExit, match="--image_size: image_size must be a multiple of patch_size"):
        segment.build(settings, "flashkat", ["a"])
    settings = segment.Settings(model=str(tmp_path / "none"), output=tmp_path / "out")
    with pytest.raises(SystemExit, match="--model: "):
        segment.build(settings, "flashkat", ["a"])
