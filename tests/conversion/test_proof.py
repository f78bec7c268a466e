"""The proof accepts a right result alone: each planted fault ends the conversion, with nothing written."""

import sys
from dataclasses import replace

import pytest
import torch
from helpers import original_state, timm_vit
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

from flashkat_hf import FlashKATConfig, convert
from flashkat_hf.conversion import conversion
from flashkat_hf.conversion.proof import PlainRational
from flashkat_hf.conversion.tensor_names import to_flashkat

HEADS = {"num_attention_heads": 2}
QKV = "flashkat.layers.1.attention.qkv.weight"
LAYER = "flashkat.layers.0."


def swap_query_and_key(config, state):
    query, key, value = state[QKV].chunk(3)
    return config, state | {QKV: torch.cat((key, query, value))}


def swap_norms(config, state):
    names = f"{LAYER}norm1.weight", f"{LAYER}norm2.weight"
    return config, state | {names[0]: state[names[1]], names[1]: state[names[0]]}


def swap_activations_rows(config, state):
    name = f"{LAYER}mlp.act2.denominator"
    return config, state | {name: state[name].flip(0)}


def transpose_patch(config, state):
    name = "flashkat.embeddings.patch_embeddings.weight"
    return config, state | {name: state[name].transpose(2, 3).contiguous()}


def shift_positions(config, state):
    name = "flashkat.embeddings.position_embeddings"
    return config, state | {name: state[name].roll(1, dims=1)}


def nudge_one_weight(config, state):
    """Change one weight by a millionth of its size: float64 sees it."""
    name = f"{LAYER}attention.proj.weight"
    return config, state | {name: state[name] * (1 + 1e-6)}


def make_nan(config, state):
    return config, state | {"classifier.bias": torch.full_like(state["classifier.bias"], torch.nan)}


FAULTS = [
    swap_query_and_key,
    swap_norms,
    swap_activations_rows,
    transpose_patch,
    shift_positions,
    nudge_one_weight,
    make_nan,
]


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        pytest.param(kind, fault, id=f"{kind}-{fault.__name__}")
        for kind in ("kat", "timm", "transformers")
        for fault in FAULTS
        if kind == "kat"
        or fault is not swap_activations_rows  # a ViT's start tables are the same in each group
    ],
)
def test_planted_faults(monkeypatch, tmp_path, kind, fault):
    if kind == "transformers":
        source = tmp_path / "vit"
        sizes = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "intermediate_size": 96,
            "image_size": 32,
            "patch_size": 8,
        }
        model = ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(source)
    else:
        source = tmp_path / "x.safetensors"
        save_file(original_state("kat") if kind == "kat" else timm_vit().state_dict(), source)
    right = to_flashkat
    monkeypatch.setattr(conversion, "to_flashkat", lambda *args: fault(*right(*args)))
    with pytest.raises(
        ValueError, match="converted does not compute the same function: largest relative difference"
    ):
        convert(source, tmp_path / "out", settings=HEADS)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_another_epsilon_is_found(monkeypatch, tmp_path):
    save_file(original_state("kat"), tmp_path / "x.safetensors")
    write = conversion.Conversion.write

    def with_other_epsilon(self, folder):
        config = FlashKATConfig(**{**self.config.to_dict(), "layer_norm_eps": 1e-5})
        return write(replace(self, config=config), folder)

    monkeypatch.setattr(conversion.Conversion, "write", with_other_epsilon)
    with pytest.raises(ValueError, match="does not compute the same function"):
        convert(tmp_path / "x.safetensors", tmp_path / "out", settings=HEADS)


def test_reported_difference_is_that_of_timms_logits(tmp_path):
    """Recomputed here from timm's logits and the written folder's, in float64, on the same images."""
    model = timm_vit()
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    report = convert(tmp_path / "x.safetensors", tmp_path / "out", settings=HEADS)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = conversion.FlashKATForImageClassification.from_pretrained(tmp_path / "out", dtype=torch.float64)
    with torch.no_grad():
        source, ours = model.double()(images), result(images).logits
    assert report.proof.difference == pytest.approx((ours - source).abs().max().item(), rel=1e-6)
    assert report.proof.spread == pytest.approx(source.std().item(), rel=1e-6)
    assert report.proof.agreement == (ours.argmax(-1) == source.argmax(-1)).double().mean()
    assert 0 < report.proof.difference < 0.1 * report.proof.spread
    swish = convert(tmp_path / "x.safetensors", tmp_path / "swish", settings=HEADS | {"act2_init": "swish"})
    assert swish.proof.difference > 5 * report.proof.difference  # what the start of the originals loses
    assert swish.proof.rounding < 1e-12


def test_plain_rational():
    """The proof's own formula against Python's arithmetic, at three channels of other groups."""
    for act, size in (("act1", 64), ("act2", 256)):
        original = original_state("kat")
        tables = [
            original[f"blocks.0.mlp.{act}.weight_{part}"].double() for part in ("numerator", "denominator")
        ]
        x = torch.linspace(-4, 4, size, dtype=torch.float64)
        y = PlainRational(*tables)(x)
        for channel in (0, size // 2, size - 1):
            a, b = tables[0][0].tolist(), tables[1][channel * 8 // size].tolist()
            at = x[channel].item()
            p = sum(value * at**k for k, value in enumerate(a))
            q = 1 + sum(abs(value) * abs(at) ** k for k, value in enumerate(b, start=1))
            assert y[channel].item() == pytest.approx(p / q, rel=1e-12)


def test_without_timm(monkeypatch, tmp_path):
    """One line names the extra; without the proof, the report says so."""
    save_file(original_state("kat"), tmp_path / "x.safetensors")
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"pip install 'flashkat_hf\[train\]', or give --no-verify"):
        convert(tmp_path / "x.safetensors", tmp_path / "out", settings=HEADS)
    assert not (tmp_path / "out").exists()
    report = convert(tmp_path / "x.safetensors", tmp_path / "out", settings=HEADS, verify=False)
    assert report.proof is None
    assert str(report).endswith("NOT VERIFIED against the source")
