"""examples/detect.py: the command with two steps, COCO's numbers by hand, and files that do not serve."""

import json
import subprocess
import sys

import numpy
import pytest
import torch
from helpers import ROOT, micro_config
from PIL import Image

from flashkat_hf import FlashKATForImageClassification
from flashkat_hf.data.samples import DataError, Sample
from flashkat_hf.training import train

pytest.importorskip("pycocotools")
sys.path.append(str(ROOT / "examples"))
import coco_boxes
import detect
from two_backbones import read_flags, whole_image_processor


def make_folder(folder):
    """Write images of 60x40 pixels with a box or two each, in COCO's form, one of them of a crowd."""
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(4):
            pixels = numpy.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype="uint8")
            Image.fromarray(pixels).save(folder / split / f"{number}.jpg")
            images.append({"id": 10 + number, "file_name": f"{number}.jpg", "width": 60, "height": 40})
            for box, category, crowd in (
                ([5, 5, 20, 30], 7, 0),
                ([30, 10, 25.5, 20], 3, 0),
                ([0, 0, 60, 40], 3, 1),
            ):
                annotation = {"id": len(annotations), "image_id": 10 + number, "category_id": category}
                annotations.append(annotation | {"bbox": box, "iscrowd": crowd})
        categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "examples/detect.py", *arguments]
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command(tmp_path):
    """From a checkpoint, on a folder: both models are saved, scored and drawn."""
    data, model, output = make_folder(tmp_path / "data"), tmp_path / "model", tmp_path / "out"
    FlashKATForImageClassification(micro_config(num_hidden_layers=2)).save_pretrained(model)
    arguments = ["--max_steps", 2, "--batch_size", 2, "--ema_decay", 0.5, "--workers", 0, "--data", data]
    done = run(*arguments, "--model", model, "--image_size", 48, "--output", output)
    assert done.returncode == 0, done.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert summary.keys() == {"flashkat", "vit"}
    assert {"map", "map_50", "map_raw", "map_ema", "seconds", "versions"} <= summary["flashkat"].keys()
    assert f"vit: mAP {summary['vit']['map']:.1%}" in done.stdout
    detector = detect.Detector.from_pretrained(output / "flashkat/best").eval()
    assert type(detector.detector.backbone.backbone).__name__ == "FlashKATBackbone"
    (found,) = detector(torch.randn(1, 3, 48, 48))
    assert found["boxes"].shape[1] == 4
    with Image.open(output / "boxes.png") as picture:
        assert picture.width > 400


def settings(*arguments: object):
    return read_flags(detect.Flags, "", [*map(str, arguments)])


def test_weights_of_the_checkpoint_are_taken(tmp_path):
    classifier = FlashKATForImageClassification(micro_config(num_hidden_layers=2))
    classifier.save_pretrained(tmp_path / "model")
    flags, given = settings("--model", tmp_path / "model", "--image_size", 48)
    backbone = detect.build(flags, given, ["a", "b"], "flashkat")[0].detector.backbone.backbone
    for name, parameter in classifier.flashkat.named_parameters():
        assert torch.equal(backbone.flashkat.get_parameter(name), parameter)
    heads = [
        [name for name, _ in detect.build(flags, given, ["a", "b"], kind)[0].detector.head.named_parameters()]
        for kind in ("flashkat", "vit")
    ]
    assert heads[0] == heads[1]


def test_it_learns(tmp_path):
    """Two images seen again and again: the loss falls, and padding is no box."""
    flags, given = settings("--image_size", 64)
    torch.manual_seed(0)
    model, processor = detect.build(flags, given, [str(digit) for digit in range(10)], "flashkat")
    data = coco_boxes.make_scenes(2, 0, 64)
    items = [detect.BoxedImage(processor, 0.0)(sample) for sample in data.train]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    assert (batch["labels"][:, :, 4] == -1).any()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_likeliest_class_of_a_place_is_drawn():
    found = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [20, 20, 30, 30], [40, 40, 50, 50]]),
        "labels": torch.tensor([1, 2, 1, 3]),
        "scores": torch.tensor([0.4, 0.6, 0.5, 0.1]),
    }
    assert [(box[3], label) for box, label, _ in detect.shown(found)] == [(11, 2), (30, 1)]


def test_image_and_boxes_are_scaled_and_mirrored_together():
    pixels = numpy.zeros((20, 40, 3), "uint8")
    pixels[5:10, 4:12] = 255
    sample = Sample(Image.fromarray(pixels), numpy.array([[4, 5, 12, 10, 1], [-1] * 5], "float32"), "one")
    for flip, box in ((0.0, [4, 10, 12, 20, 1]), (1.0, [28, 10, 36, 20, 1])):
        item = detect.BoxedImage(whole_image_processor(40), flip)(sample)
        assert item["labels"][0].tolist() == box
        assert item["labels"][1, 4] == -1
        bright = (item["pixel_values"] > 0).all(0).nonzero()
        assert (bright.min(0).values - torch.tensor([box[1], box[0]])).abs().max() <= 1
        assert (bright.max(0).values + 1 - torch.tensor([box[3], box[2]])).abs().max() <= 1


def test_mean_precision():
    """One of two boxes is found, exactly, below a wrong one: precision 1/2 up to recall 1/2, at every IoU."""
    true = [[0, 0, 10, 10, 0], [20, 20, 30, 30, 0]]
    found = [[0, 0, 10, 10, 0, 0.8], [40, 40, 50, 50, 0, 0.9]]
    scores = detect.mean_precision([(true, found)], 1)
    assert scores["map"] == pytest.approx(0.5 * 51 / 101)
    assert scores["map_50"] == scores["map"]
    assert detect.mean_precision([(true, [])], 1) == {"map": 0.0, "map_50": 0.0}


def test_made_up_scenes():
    """The same each time; boxes are inside, apart, and where the picture differs from its photograph."""
    first, again = (coco_boxes.make_scenes(8, 0, 64) for _ in range(2))
    assert first.fingerprint == again.fingerprint != coco_boxes.make_scenes(8, 1, 64).fingerprint
    assert len(first.test) == 2
    for image, rows, _ in first.train:
        boxes = rows[rows[:, 4] >= 0]
        assert image.size == (64, 64)
        assert 1 <= len(boxes) <= 4
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:4] <= 64).all()
        assert (boxes[:, :2] < boxes[:, 2:4]).all()


def test_a_folder(tmp_path):
    """Categories by their ids' order, crowds left out, rows padded to one length."""
    data = coco_boxes.read_folder(make_folder(tmp_path / "data"))
    assert data.class_names == ["cat", "dog"]
    rows = data.train[0].label
    assert rows.tolist() == [[5, 5, 25, 35, 1], [30, 10, 55.5, 30, 0]]


def change(**values):
    def spoil(folder) -> None:
        content = json.loads((folder / "val.json").read_text())
        content["annotations"][1] |= values
        (folder / "val.json").write_text(json.dumps(content))

    return spoil


def without_image(folder):
    (folder / "train/2.jpg").unlink()


def damaged(folder):
    (folder / "train/1.jpg").write_bytes(b"no image")


def other_size(folder):
    Image.new("RGB", (40, 60)).save(folder / "train/1.jpg")


def other_categories(folder):
    content = json.loads((folder / "val.json").read_text())
    content["categories"][0]["name"] = "wolf"
    (folder / "val.json").write_text(json.dumps(content))


def no_json(folder):
    (folder / "val.json").write_text("{")


def a_list(folder):
    (folder / "val.json").write_text("{}")


def no_file(folder):
    (folder / "val.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change(bbox=[40, 5, 30, 10]), r"annotation 1 has the box .*\] outside its image of 60x40"),
        (change(bbox=[-1, 5, 30, 10]), r"annotation 1 has the box \[-1, 5, 30, 10\] outside"),
        (change(bbox=[4, 5, 0, 10]), r"annotation 1 has the box \[4, 5, 0, 10\] without an area"),
        (change(bbox=[4, 5, 1]), r"annotation 1 has the box \[4, 5, 1\], not \[left, top, width, height\]"),
        (change(bbox=None), r"annotation 1 has the box null, not"),
        (change(category_id=9), "annotation 1 has the unknown category 9"),
        (change(image_id=99), "annotation 1 is of image 99, which is not listed"),
        (without_image, r"train\.json names the image 2\.jpg, but .*2\.jpg is missing"),
        (damaged, r"cannot read the image .*train/1\.jpg"),
        (other_size, r"train\.json says that 1\.jpg has 60x40 pixels, but it has 40x60"),
        (other_categories, r"train\.json and val\.json name other categories"),
        (no_json, r"val\.json"),
        (a_list, r"val\.json has no list 'images', as COCO's form has it"),
        (no_file, r"val\.json is missing"),
    ],
)  # fmt: skip
def test_bad_folders(spoil, message, tmp_path):
    folder = make_folder(tmp_path / "data")
    spoil(folder)
    with pytest.raises(DataError, match=message) as error:
        coco_boxes.read_folder(folder)
    assert "\n" not in str(error.value)


def test_bad_settings(tmp_path):
    """In one line, before anything learns."""
    with pytest.raises(ValueError, match="--head_size: 48 must be a multiple of 32"):
        settings("--head_size", 48)
    flags, given = settings("--image_size", 50)
    with pytest.raises(ValueError, match="--image_size: image_size must be a multiple of patch_size"):
        detect.build(flags, given, ["a"], "flashkat")
    _, given = settings("--label_smoothing", 0.2, "--output", tmp_path / "out")
    with pytest.raises(ValueError, match=r"--label_smoothing: 0\.2 means nothing for Detection"):
        train(given, task=detect.Detection(8))
    done = run("--data", tmp_path / "none", "--output", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr == f"detect.py: --data: {tmp_path}/none/train.json is missing\n"
    assert not (tmp_path / "out").exists()
