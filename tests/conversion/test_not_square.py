"""Images and patches that are not square: conversion is proved as for squares, and `info` says the sides."""

import pytest
import timm
import torch
from helpers import timm_vit
from transformers import (
    ViTConfig,
    ViTForImageClassification,
)

from flashkat_hf import FlashKATForImageClassification, convert
from flashkat_hf.checkpoints.description import describe
from flashkat_hf.checkpoints.loading import load_checkpoint
from flashkat_hf.conversion import proof

MICRO = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": [48, 32]}


def vit(patch_size) -> torch.nn.Module:
    config = ViTConfig(**MICRO, intermediate_size=128, patch_size=patch_size, num_labels=3)
    return ViTForImageClassification(config).eval()


@pytest.mark.parametrize("patch_size", [8, [8, 4]])
def test_transformers_vit(patch_size, tmp_path):
    vit(patch_size).save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out")
    assert report.proof.rounding < proof.ROUNDING
    patches = "8" if patch_size == 8 else "8x4"
    assert f"patches of {patches} in 48x32 pixels" in str(report)
    model, processor = load_checkpoint(str(tmp_path / "out"))
    assert list(model.config.image_size) == [48, 32]
    assert dict(processor.crop_size) == {"height": 48, "width": 32}
    assert f"48x32 pixels, 3 channels, patches of {patches};" in describe(str(tmp_path / "out"))
    square = convert(tmp_path / "source", tmp_path / "square", image_size=40)
    assert square.config.image_size == 40
    assert square.proof.rounding < proof.ROUNDING


def test_weights_alone_need_the_sides(tmp_path):
    """Of 24 positions and a class token's, only the user knows rows and columns."""
    torch.save(vit(8).state_dict(), tmp_path / "vit.pth")
    heads = {"num_attention_heads": 2}
    with pytest.raises(ValueError, match=r"25 positions are no square .*image_size=\[HEIGHT, WIDTH\]"):
        convert(tmp_path / "vit.pth", tmp_path / "out", settings=heads)
    with pytest.raises(ValueError, match=r"25 positions are no square .*do not fit images of \[48, 40\]"):
        convert(tmp_path / "vit.pth", tmp_path / "out", settings=heads | {"image_size": [48, 40]})
    report = convert(tmp_path / "vit.pth", tmp_path / "out", settings=heads | {"image_size": [48, 32]})
    assert list(report.config.image_size) == [48, 32]
    assert report.proof.rounding < proof.ROUNDING


def test_timm_vit(tmp_path):
    model = timm_vit(img_size=(24, 48), patch_size=(8, 16), class_token=True)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    sides = {"num_attention_heads": model.blocks[0].attn.num_heads, "image_size": [24, 48]}
    report = convert(tmp_path / "vit.pth", tmp_path / "out", settings=sides)
    assert report.proof.rounding < proof.ROUNDING
    assert list(report.config.patch_size) == [8, 16]
    # nine patches are a square, too
    del sides["image_size"]
    again = convert(tmp_path / "vit.pth", tmp_path / "again", settings=sides)
    assert list(again.config.image_size) == [24, 48]


def test_timm_says_the_sides(tmp_path):
    arguments = {"img_size": [32, 48], "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    timm.models.save_for_hf(model, tmp_path / "source", model_args=arguments)
    report = convert(tmp_path / "source", tmp_path / "out")
    assert list(report.config.image_size) == [32, 48]
    assert report.proof.rounding < proof.ROUNDING


def test_registers(tmp_path):
    """With registers, and positions of none of them; `info` says how many there are."""
    model = timm_vit(img_size=(24, 32), reg_tokens=3, no_embed_class=True)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    sides = {"num_attention_heads": 2, "image_size": [24, 32]}
    report = convert(tmp_path / "vit.pth", tmp_path / "out", settings=sides)
    assert report.proof.rounding < proof.ROUNDING
    assert "registers   3 tokens without a place" in describe(str(tmp_path / "out"))
    result = FlashKATForImageClassification.from_pretrained(tmp_path / "out")
    assert result(torch.randn(1, 3, 24, 32)).logits.shape == (1, 10)
