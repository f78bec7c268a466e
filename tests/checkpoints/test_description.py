"""`flashkat info` of a model at its start, of a learned one, and of what is no model."""

import json

import pytest
import torch
from helpers import micro_config, original_state
from transformers import CLIPImageProcessor

from flashkat_hf import FlashKATForImageClassification, convert, make_image_processor
from flashkat_hf.checkpoints.description import describe


@pytest.fixture
def folder(tmp_path):
    model = FlashKATForImageClassification(micro_config(id2label={i: f"digit {i}" for i in range(10)}))
    model.save_pretrained(tmp_path)
    make_image_processor(32).save_pretrained(tmp_path)
    return tmp_path


def test_at_the_start(folder):
    assert describe(str(folder)).splitlines() == [
        f"{folder}: FlashKATForImageClassification, 114,402 parameters, torch.float32",
        "layers      2 of 64 channels, 2 heads, MLP 256",
        "image       32 pixels, 3 channels, patches of 8; mean 0.485 0.456 0.406, std 0.229 0.224 0.225",
        "pooling     cls",
        "labels      10: digit 0, digit 1, digit 2, digit 3, digit 4, ...",
        "rationals   8 groups, one numerator; starts identity, swish",
        "activations at their start tables",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learned(folder, dtype):
    """r(x) = x of layer 1 becomes x + 0.25: it has moved by that, and nothing else has, rounded or not."""
    model = FlashKATForImageClassification.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        model.flashkat.layers[1].mlp.act1.numerator[0, 0] = 0.25
    model.save_pretrained(folder)
    assert describe(str(folder)).splitlines()[-4:] == [
        "activations learned; largest distance from the start on [-3, 3], any group:",
        "  layer      act1      act2",
        "      0    0.0000    0.0000",
        "      1    0.2500    0.0000",
    ]


def test_a_signs_change_of_the_denominator_is_no_move(folder):
    model = FlashKATForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        model.flashkat.layers[0].mlp.act2.denominator.neg_()
    model.save_pretrained(folder)
    assert describe(str(folder)).endswith("activations at their start tables")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_size": {"height": 24, "width": 24}}, "makes images of 24 pixels, but the model takes 32"),
        ({"image_std": [0.2, float("nan"), 0.2]}, "image_std .*nan.*, no finite numbers"),
        ({"image_std": [0.2, 0.0, 0.2]}, "image_std .* must be positive"),
        ({"image_mean": [0.5, 0.5]}, "image_mean .*, but the model takes 3 channels"),
        ({"image_processor_type": "GreyViTImageProcessor"}, "mean must have 1 elements"),
        (
            {"size": {"shortest_edge": 100_000}},
            r"resizes to \[100000\], .* 32 pixels; up to 1024 are expected",
        ),
        ({"size": {"shortest_edge": "37"}}, r"resizes to \['37'\]"),
        ({"do_center_crop": False}, "makes images of 37x46 pixels"),
    ],
)
def test_a_processor_that_does_not_fit(folder, changes, message):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=f"cannot load {folder}: .*{message}"):
        describe(str(folder))


def test_another_processor(folder):
    """It is imported and tried, as before the model is used; here it divides by 127.5 and subtracts 1."""
    CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size=32,
        image_mean=[1.0] * 3,
        image_std=[1.0] * 3,
        rescale_factor=1 / 127.5,
    ).save_pretrained(folder)
    assert "mean 0.5 0.5 0.5, std 0.5 0.5 0.5" in describe(str(folder))


def test_no_head(tmp_path):
    state = {name: tensor for name, tensor in original_state("kat").items() if not name.startswith("head.")}
    torch.save(state, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "out", settings={"num_attention_heads": 2})
    assert "labels      0, no head" in describe(str(tmp_path / "out")).splitlines()


def test_what_is_no_flashkat(tmp_path):
    torch.save(original_state("kat"), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"cannot load .*flashkat convert") as caught:
        describe(str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is not a folder"):
        describe(str(tmp_path / "x.pth"))
