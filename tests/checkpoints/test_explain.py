"""What a prediction rests on: the rollout by hand, the gradients by their axiom, picture and messages."""

import importlib.util
import sys

import pytest
import torch
from helpers import micro_config
from PIL import Image

from flashkat_hf import FlashKATForImageClassification, make_image_processor
from flashkat_hf.checkpoints.explain import attention_rollout, explain
from flashkat_hf.cli import main

needs_captum = pytest.mark.skipif(
    importlib.util.find_spec("captum") is None, reason="captum is in the extras explain and dev"
)


@pytest.fixture
def model() -> FlashKATForImageClassification:
    model = FlashKATForImageClassification(micro_config(id2label={i: f"digit {i}" for i in range(10)}))
    with torch.no_grad():
        model.classifier.weight.normal_()
        for parameter in model.flashkat.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.train()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_rollout_is_the_product_of_the_layers(pooling):
    first, second = (torch.rand(2, 3, 5, 5).softmax(-1) for _ in range(2))
    half = [0.5 * weights.mean(1) + 0.5 * torch.eye(5) for weights in (first, second)]
    flow = half[1] @ half[0]
    expected = flow[:, 0, 1:] if pooling == "cls" else flow[:, 1:, 1:].mean(1)
    torch.testing.assert_close(attention_rollout((first, second), pooling), expected)
    same = torch.eye(5).expand(2, 3, 5, 5)
    assert attention_rollout((same, same), "cls").sum() == 0  # nothing reaches the cls token


@needs_captum
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_gradients_add_up_to_the_output(model, pooling):
    model.config.pooling = pooling
    pixels = torch.randn(1, 3, 32, 32)
    modes = [module.training for module in model.modules()]
    explanation = explain(model, pixels, "digit 3")
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    model.eval()
    with torch.no_grad():
        logits = model(torch.cat([pixels, torch.zeros_like(pixels)])).logits
    gained = (logits[0] - logits[1])[3].item()
    assert abs(gained) > 0.1
    total = explanation.gradients.sum().item()
    assert total + explanation.missing == pytest.approx(gained, abs=1e-4)
    assert abs(explanation.missing) < 0.02 * abs(gained)
    assert explanation.patch_gradients.sum().item() == pytest.approx(total, abs=1e-5)
    assert explanation.patch_gradients[0, 1].item() == pytest.approx(
        explanation.gradients[:8, 8:16].sum().item(), abs=1e-5
    )
    assert explanation.rollout.shape == (4, 4)
    assert 0 < explanation.rollout.sum() < 1
    assert (explanation.label, explanation.name) == (3, "digit 3")
    assert explanation.probability == pytest.approx(logits[0].softmax(-1)[3].item(), abs=1e-5)
    assert explain(model, pixels).label == logits[0].argmax()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    make_image_processor(32).save_pretrained(tmp_path / "model")
    Image.effect_noise((40, 40), 80).convert("RGB").save(tmp_path / "a.png")
    return tmp_path / "model"


@needs_captum
def test_command(folder, tmp_path, capsys):
    words = ["explain", str(folder), str(tmp_path / "a.png"), "-o", str(tmp_path / "map.png")]
    assert main([*words, "--label", "7"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'map.png'} written: digit 7, ")
    with Image.open(tmp_path / "map.png") as image:
        assert image.width > 1000
    assert main(words) == 1
    assert "map.png exists; --overwrite replaces it" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--label", "cat"]) == 1
    assert "the model has no label 'cat'; it has 10, such as digit 0" in capsys.readouterr().err


@needs_captum
def test_what_is_refused(model):
    with pytest.raises(
        ValueError, match=r"must have shape \(1, channels, height, width\), not \(2, 3, 32, 32\)"
    ):
        explain(model, torch.zeros(2, 3, 32, 32))
    headless = FlashKATForImageClassification(micro_config(num_labels=0))
    with pytest.raises(ValueError, match="the model has no head"):
        explain(headless, torch.zeros(1, 3, 32, 32))


def test_captum_is_missing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    assert main(["explain", str(folder), str(tmp_path / "a.png"), "-o", str(tmp_path / "map.png")]) == 1
    error = capsys.readouterr().err
    assert "captum.attr is missing: pip install 'flashkat_hf[explain]'" in error
    assert error.count("\n") == 1
