"""`import flashkat_hf` is enough for Auto classes, pipelines, saves and loads; broken folders are errors."""

import os
import subprocess
import sys

import numpy
import pytest
import torch
from helpers import micro_config
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification, FlashKATModel, make_image_processor


@pytest.fixture
def image() -> Image.Image:
    pixels = numpy.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    labels = {i: f"digit {i}" for i in range(10)}
    config = micro_config(id2label=labels, label2id={name: i for i, name in labels.items()})
    FlashKATForImageClassification(config).save_pretrained(tmp_path)
    make_image_processor(image_size=32).save_pretrained(tmp_path)
    return tmp_path


def test_auto_classes(folder):
    assert type(AutoConfig.from_pretrained(folder)) is FlashKATConfig
    assert type(AutoModel.from_pretrained(folder)) is FlashKATModel
    assert type(AutoModelForImageClassification.from_pretrained(folder)) is FlashKATForImageClassification


def test_saving_and_loading_keeps_every_bit(folder, tmp_path):
    stored = load_file(folder / "model.safetensors")
    model = AutoModelForImageClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert stored.keys() == again.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name])
        assert torch.equal(tensor, again[name])


def test_loading_initialises_nothing_that_was_loaded(folder, monkeypatch):
    monkeypatch.setattr(
        "flashkat_hf.model.modeling_flashkat.mimetic_weights", None
    )  # the costly part of a start
    AutoModelForImageClassification.from_pretrained(folder)
    with pytest.raises(TypeError):
        FlashKATModel(micro_config())


def test_missing_coefficients_are_refilled(folder):
    """Loading builds on the meta device, where whatever `__init__` alone sets would be lost."""
    path = folder / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if "act1" not in k and "qkv" not in k}
    save_file(tensors, path, metadata={"format": "pt"})
    model = AutoModelForImageClassification.from_pretrained(folder)
    start_numerator, start_denominator = model.flashkat.layers[1].mlp.act1.start()
    assert torch.equal(model.flashkat.layers[1].mlp.act1.numerator, start_numerator)
    assert torch.equal(model.flashkat.layers[1].mlp.act1.denominator, start_denominator)
    assert model.flashkat.layers[1].attention.qkv.weight.isfinite().all()
    assert torch.equal(
        model.flashkat.layers[1].attention.proj.weight, tensors["flashkat.layers.1.attention.proj.weight"]
    )


def test_new_head(folder):
    model = AutoModelForImageClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True
    )
    assert model.classifier.weight.shape == (3, 64)
    assert model.classifier.weight.detach().std() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_image_processor(folder, image, backend):
    """The processor agrees with PIL by hand: bicubic to 32 / 0.875, centre crop, mean and std."""
    processor = AutoImageProcessor.from_pretrained(folder, backend=backend)
    actual = processor(image.convert("L"), return_tensors="pt")["pixel_values"][0]
    resized = (
        image.convert("L").convert("RGB").resize((55, 37), Image.Resampling.BICUBIC)
    )  # 32 / 0.875 = 36.6
    left, top = (55 - 32) // 2, (37 - 32) // 2
    pixels = numpy.asarray(resized, dtype=numpy.float32)[top : top + 32, left : left + 32] / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    one_level = 1 / 255 / 0.224  # torchvision's resize rounds some pixels the other way
    assert actual.shape == (3, 32, 32)
    assert numpy.abs(actual.permute(1, 2, 0).numpy() - expected).max() < (
        1.01 * one_level if backend != "pil" else 1e-5
    )


def test_default_image_processor_is_kats_evaluation():
    processor = make_image_processor()
    assert processor.size["shortest_edge"] == 256
    assert (processor.crop_size["height"], processor.crop_size["width"]) == (224, 224)
    with pytest.raises(ValueError, match=r"crop \(0\) must be in"):
        make_image_processor(crop=0)


def test_pipeline(folder, image):
    (best, *_) = pipeline("image-classification", model=str(folder))(image)
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    probabilities = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    assert best["label"] == f"digit {probabilities.argmax()}"
    assert best["score"] == pytest.approx(probabilities.max().item(), rel=1e-4)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(Exception, match=r"(?i)safetensors|header|incomplete|deserializ"):
        AutoModelForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("config", ['{"model_type": "vit"}', None])
def test_weights_of_another_architecture(folder, config):
    """They are an error; tensors that a FlashKAT's own folder or a caller's state lacks start as always."""
    save_file({"layer.weight": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = FlashKATForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == model.state_dict().keys()
    assert model.flashkat.layers[1].mlp.act1.numerator[0, :3].tolist() == [0, 1, 0]  # the identity
    empty = FlashKATModel.from_pretrained(None, config=model.config, state_dict={})
    assert empty.embeddings.position_embeddings.isfinite().all()
    own = model.config
    (folder / "config.json").unlink()
    if config:
        (folder / "config.json").write_text(config)
    with pytest.raises(
        ValueError, match=r"holds none of FlashKATForImageClassification.*such as layer.weight"
    ):
        FlashKATForImageClassification.from_pretrained(folder, config=own)


@pytest.mark.parametrize("missing", ["triton", "torchvision"])
def test_works_without(missing, folder):
    """The package imports on a laptop without triton and on a server without torchvision."""
    script = f"""
import sys
sys.modules[{missing!r}] = None  # importing it raises ImportError
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == {missing!r} else find_spec(name, *a)
import torch, flashkat_hf, transformers
model = transformers.AutoModelForImageClassification.from_pretrained({str(folder)!r})
processor = type(flashkat_hf.make_image_processor()).from_pretrained({str(folder)!r})
from PIL import Image
model(**processor(Image.new("RGB", (50, 50)), return_tensors="pt"), labels=torch.tensor([3])).loss.backward()
print("works", flashkat_hf.make_image_processor().__class__.__name__)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout.startswith("works"), result.stderr
    assert ("Pil" in result.stdout) == (missing == "torchvision")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_saved_files_have_the_umasks_permissions(tmp_path, umask, mode):
    """Also in shards; safetensors alone would let nobody but their owner read them."""
    model, before = FlashKATForImageClassification(micro_config()), os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "whole")
        model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) > 2
    assert {path.stat().st_mode & 0o777 for path in files if path.suffix != ".py"} == {mode}
