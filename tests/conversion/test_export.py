"""The way back: weights in the original's naming, the same bits, whole or not at all."""

import errno

import pytest
import torch
from helpers import original_state
from safetensors.torch import load_file

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification, convert, make_image_processor
from flashkat_hf.conversion import export
from flashkat_hf.conversion.export import export_original

HEADS = {"num_attention_heads": 2}
VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96} | {
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture
def kat(tmp_path):
    torch.save(original_state("kat"), tmp_path / "kat.pth")
    return tmp_path / "kat.pth"


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", ["kat", "flashkat"])
def test_export_there_and_back(kind, suffix, tmp_path):
    original = original_state(kind)
    torch.save(original, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "ours", settings=HEADS)
    out = tmp_path / f"back{suffix}"
    text = export_original(tmp_path / "ours", out, naming=kind)
    assert text.startswith(
        f"{kind} naming, img_size=32, patch_size=8, in_chans=3, num_classes=10, embed_dim=64"
    )
    back = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)
    with pytest.raises(ValueError, match="exists; --overwrite replaces it"):
        export_original(tmp_path / "ours", out, naming=kind)
    export_original(tmp_path / "ours", out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["x.pth", "ours", out.name])


def test_export_of_a_fine_tuned_model(tmp_path):
    """Own numerators, mean pooling, another eps: FlashKAT's naming by itself, and a warning of the eps."""
    config = {
        "num_numerator_groups": 8,
        "pooling": "mean",
        "layer_norm_eps": 1e-5,
        "num_labels": 4,
        "qkv_bias": False,
    }
    folder = tmp_path / "ours"
    FlashKATConfig(**{**VIT, **config}).save_pretrained(folder)
    model = FlashKATForImageClassification(FlashKATConfig(**{**VIT, **config}))
    model.save_pretrained(folder)
    make_image_processor(32).save_pretrained(folder)
    text = export_original(folder, tmp_path / "out.safetensors")
    assert text.startswith("flashkat naming")
    assert "qkv_bias=False, global_pool='avg'; mind that it normalises with eps 1e-05" in text
    back = load_file(tmp_path / "out.safetensors")
    assert torch.equal(back["fc_norm.weight"], model.flashkat.norm.weight.detach())
    assert back["blocks.1.mlp.act1.numerator_v"].shape == (8, 6)
    with pytest.raises(ValueError, match="KAT shares one numerator"):
        export_original(folder, tmp_path / "kat.pth", naming="kat")


def test_export_refusals(kat, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must end in .safetensors or .pth"):
        export_original(kat, tmp_path / "out")
    with pytest.raises(ValueError, match=r"kat.pth is not a folder"):
        export_original(kat, tmp_path / "out.pth")
    convert(kat, tmp_path / "ours", settings=HEADS)
    monkeypatch.setattr(export, "save_file", full_disk)
    with pytest.raises(ValueError, match=r"cannot write .*: No space left on device; nothing is written"):
        export_original(tmp_path / "ours", tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kat.pth", "ours"]


def test_torchs_own_error_of_a_full_disk(kat, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 260416 vs 260368")

    convert(kat, tmp_path / "ours", settings=HEADS)
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(ValueError, match=r"cannot write .*perhaps the disk is full .*; nothing is written"):
        export_original(tmp_path / "ours", tmp_path / "out.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kat.pth", "ours"]
