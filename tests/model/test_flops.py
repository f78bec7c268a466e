"""FLOP counters and hooks on all modules see what kernels would stand for."""

import pytest
import torch
from helpers import micro_config
from torch.nn.functional import linear
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from flashkat_hf import FlashKATForImageClassification
from flashkat_hf.model import fusing
from flashkat_hf.model.op_attention import packed_attention
from flashkat_hf.model.op_rational import rational
from flashkat_hf.model.op_rational_mlp import rational_mlp


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


def test_flops_of_operators_whose_products_a_counter_cannot_see():
    """Traced, attention and MLP are operators: they count what PyTorch's own operations do."""
    images, tokens, width, heads, hidden = 2, 17, 64, 4, 96
    qkv = torch.randn(images, tokens, 3 * width, dtype=torch.bfloat16)
    x, weight, out_weight = (
        torch.randn(images, tokens, width, requires_grad=True),
        torch.randn(hidden, width, requires_grad=True),
        torch.randn(width, hidden, requires_grad=True),
    )
    tables = torch.randn(8, 6), torch.randn(8, 4)
    biases = torch.zeros(hidden), torch.zeros(width)

    def counted(call) -> tuple[int, int]:
        """Return the operations of the forward and of the backward pass."""
        forward, backward = (FlopCounterMode(display=False) for _ in range(2))
        with forward:
            y = call()
        with backward:
            y.float().sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    def plain_attention() -> torch.Tensor:
        q, k, v = given.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return (q @ k.mT).softmax(-1) @ v

    given = qkv.clone().requires_grad_()
    forward, backward = counted(lambda: packed_attention(given, heads, 0.25))
    plain = counted(plain_attention)
    assert (forward, backward) == (plain[0], plain[1] + plain[0] // 2)  # scores are made again

    def plain_mlp() -> torch.Tensor:
        return linear(rational(linear(x, weight, biases[0]), *tables), out_weight, biases[1])

    fused = counted(lambda: rational_mlp(x, weight, biases[0], *tables, out_weight, biases[1]))
    assert fused == counted(plain_mlp)
    assert fused[0] == 4 * images * tokens * width * hidden


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
