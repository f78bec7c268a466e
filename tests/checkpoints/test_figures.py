"""Pictures of functions and curves: what is drawn, read off the figures."""

import sys

import numpy
import pytest
import torch
from helpers import micro_config
from torch import nn

from flashkat_hf import FlashKATForImageClassification, FlashKATModel
from flashkat_hf.checkpoints.figures import noise_images, plot_functions, used_ranges
from flashkat_hf.model.reference import rational_value


def curves(panel) -> dict[str, tuple[numpy.ndarray, numpy.ndarray]]:
    return {
        line.get_label(): line.get_data()
        for line in panel.get_lines()
        if not line.get_label().startswith("_")
    }


def test_functions_of_every_group_are_drawn(tmp_path):
    model = FlashKATForImageClassification(micro_config(num_hidden_layers=7, num_numerator_groups=8)).train()
    with torch.no_grad():
        for layer in model.flashkat.layers:
            layer.mlp.act2.numerator.add_(torch.randn(8, 6), alpha=0.1)
    state = torch.get_rng_state()
    figure = plot_functions(nn.ModuleDict({"wrapped": model}))
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    panels = [panel for panel in figure.axes if panel.axison]
    assert [panel.get_title() for panel in panels if panel.get_title()] == [f"layer {i}" for i in range(7)]
    assert len(panels) == 14
    act = model.flashkat.layers[6].mlp.act2
    drawn = curves([panel for panel in figure.axes if panel.axison][-1])
    assert drawn.keys() == {"start", *(f"group {i}" for i in range(8))}
    tables = act.numerator.detach().double(), act.denominator.detach().double()
    for group in range(8):
        x, y = (torch.as_tensor(values) for values in drawn[f"group {group}"])
        torch.testing.assert_close(
            y[:, None], rational_value(x[:, None], *(table[group : group + 1] for table in tables))
        )
    x, y = (torch.as_tensor(values) for values in drawn["start"])
    swish = x * torch.sigmoid(x)
    assert (y - swish).abs().max() < 1e-3
    figure.savefig(tmp_path / "functions.png")


def test_ranges_are_those_of_the_inputs():
    """The first act1 sees a layer norm's output: standard normal, moved and scaled by its parameters."""
    model = FlashKATModel(micro_config(hidden_size=256, num_attention_heads=4))
    with torch.no_grad():
        model.layers[0].norm2.weight[:32] *= 3
        model.layers[0].norm2.bias[-32:] += 10
    ranges = used_ranges(model)
    assert ranges.keys() == {(layer, name) for layer in range(2) for name in ("act1", "act2")}
    low, high = ranges[0, "act1"]
    assert low.shape == high.shape == (8,)
    assert (low < high).all()
    assert 2.5 < (high - low)[0] / (high - low)[1:7].mean() < 3.5
    assert 8 < (low + high)[-1] / 2 < 12
    assert (low + high)[:7].abs().max() < 4
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_noise_has_the_spectrum_of_photographs():
    images = noise_images(8, 1, 64)
    power = torch.fft.rfft2(images).abs().square().mean((0, 1))
    low, high = power[4, 0], power[16, 0]
    assert 6 < low / high < 40  # 16 for amplitudes that fall as 1/f
    assert torch.equal(images, noise_images(8, 1, 64))


def test_nothing_to_draw(monkeypatch):
    with pytest.raises(ValueError, match="Linear is not a FlashKAT and contains none"):
        plot_functions(nn.Linear(2, 2))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'flashkat_hf\[train\]'"):
        plot_functions(FlashKATModel(micro_config()))
