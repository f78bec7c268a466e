"""FLOP counters and hooks on all modules see what kernels would stand for."""

import pytest
import torch
from helpers import micro_config
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from flashkat_hf import FlashKATForImageClassification
from flashkat_hf.model import fusing


@pytest.fixture
def fused(device, monkeypatch):
    """Return a model for whose modules kernels may stand, and images."""
    monkeypatch.setattr(fusing, "TRITON_DEVICES", (device,))
    model = FlashKATForImageClassification(micro_config(attn_implementation="eager")).to(device)
    return model, torch.randn(2, 3, 32, 32, device=device)


def by_hand() -> dict[str, int]:
    """Return the products of the micro model's forward, two operations each, by what they belong to."""
    images, tokens, width, mlp, layers = 2, 17, 64, 256, 2
    linear = {
        "attention": images * tokens * 4 * width**2 + images * 2 * tokens**2 * width,
        "mlp": images * tokens * 2 * width * mlp,
    }
    patches = images * 16 * 3 * 8 * 8 * width
    whole = patches + layers * sum(linear.values()) + images * width * 10
    counts = {**linear, "": whole, "step": 3 * whole - patches}  # images have no gradient
    return {name: 2 * count for name, count in counts.items()}


def test_flops_are_the_plain_blocks(fused, monkeypatch):
    model, images = fused
    forward, both = (FlopCounterMode(display=False) for _ in range(2))
    with forward, torch.no_grad():
        model(images)
    expected, name = by_hand(), type(model).__name__
    counts = forward.get_flop_counts()
    assert forward.get_total_flops() == expected[""]
    for part in ("attention", "mlp"):
        assert sum(counts[f"{name}.flashkat.layers.1.{part}"].values()) == expected[part]
    with both:
        model(images).logits.sum().backward()
    monkeypatch.setattr(fusing, "TRITON_DEVICES", ())
    plain = FlopCounterMode(display=False)
    with plain:
        model(images).logits.sum().backward()
    assert both.get_flop_counts() == plain.get_flop_counts()
    assert both.get_total_flops() == expected["step"]


def test_hooks_on_all_modules_hear_each(fused):
    model, images = fused
    heard = set()
    handle = register_module_forward_hook(lambda module, *_: heard.add(module))
    try:
        model(images)
    finally:
        handle.remove()
    silent = {name for name, module in model.named_modules() if module not in heard}
    assert silent == {"flashkat.layers"}  # a list
    assert fusing.fuses(images, model.flashkat.layers[0].mlp)
