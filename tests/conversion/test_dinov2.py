"""DINOv2 converts, proved by transformers' own or timm's: layer scale, registers, positions of every kind."""

import pytest
import torch
from helpers import timm_vit
from safetensors.torch import load_file
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from flashkat_hf import FlashKATBackbone, FlashKATModel, convert
from flashkat_hf.conversion import proof

MICRO = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


def scattered(model: torch.nn.Module) -> torch.nn.Module:
    """Make every parameter random and large enough to matter, layer scale and the mask token too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def dinov2(registers: int = 0, head: bool = False) -> torch.nn.Module:
    if registers:
        return scattered(
            Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**MICRO, num_register_tokens=registers))
        )
    model_class = Dinov2ForImageClassification if head else Dinov2Model
    return scattered(model_class(Dinov2Config(**MICRO, num_labels=3)))


def with_gelu(folder) -> FlashKATModel:
    """Load the result with exact GELUs in place of act2's table, so that it equals its source to rounding."""
    model = FlashKATModel.from_pretrained(folder, dtype=torch.float64).eval()
    for layer in model.layers:
        layer.mlp.act2 = torch.nn.GELU()
    return model


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("in_memory", [False, True])
def test_transformers_dinov2(registers, in_memory, tmp_path):
    source = dinov2(registers)
    source.save_pretrained(tmp_path / "source")
    where = tmp_path / "source"
    if in_memory:
        where = tmp_path / "state.pth"
        torch.save(source.state_dict(), where)
    report = convert(where, tmp_path / "out", settings={"num_attention_heads": 2} if in_memory else None)
    assert report.title == ("transformers 5 DINOv2" if in_memory else "transformers DINOv2")
    assert report.proof.outputs == "pooled features"
    assert report.proof.rounding < proof.FOLDED_ROUNDING
    assert any("mask token left out" in note for note in report.notes)
    config = report.config
    assert (config.num_register_tokens, config.layer_norm_eps, config.patch_size) == (registers, 1e-6, 7)
    images = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    result, expected = with_gelu(tmp_path / "out")(images), source.double()(images)
    torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    backbone = FlashKATBackbone.from_pretrained(tmp_path / "out")
    assert backbone(torch.randn(1, 3, 35, 49)).feature_maps[0].shape == (1, 64, 5, 7)


def test_its_own_head_is_left_out(tmp_path):
    dinov2(head=True).save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out")
    assert report.config.num_labels == 0
    assert any("its head reads the class token beside the patches' mean" in note for note in report.notes)
    report = convert(tmp_path / "source", tmp_path / "fresh", num_labels=4, image_size=42)
    assert (report.config.num_labels, report.config.image_size) == (4, 42)
    assert load_file(tmp_path / "fresh/model.safetensors")["classifier.weight"].shape == (4, 64)


@pytest.mark.parametrize(
    "arguments",
    [
        {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},  # as vit_small_patch14_reg4_dinov2
        {"reg_tokens": 2, "no_embed_class": False},  # positions of registers, too
        {"reg_tokens": 1, "no_embed_class": True, "global_pool": "avg"},
        {"init_values": 1.0},  # as vit_small_patch14_dinov2
    ],
    ids=str,
)
@pytest.mark.parametrize("image_size", [None, 48])
def test_timm_with_registers(arguments, image_size, tmp_path):
    """Proved against timm with registers and positions of their own, also when they are resized."""
    torch.save(timm_vit(**arguments).state_dict(), tmp_path / "vit.pth")
    settings = {"num_attention_heads": 2}
    report = convert(tmp_path / "vit.pth", tmp_path / "out", settings=settings, image_size=image_size)
    assert report.config.num_register_tokens == arguments.get("reg_tokens", 0)
    folded = "init_values" in arguments or arguments.get("no_embed_class") is False
    assert report.proof.rounding < (proof.FOLDED_ROUNDING if folded else proof.ROUNDING)
    assert report.proof.outputs == "logits"


def test_gated_mlps_are_refused(tmp_path):
    scattered(Dinov2Model(Dinov2Config(**MICRO, use_swiglu_ffn=True))).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="it has a gated MLP"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()
