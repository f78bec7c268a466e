"""GroupRational and GRKANMlp."""

import pytest
import torch

from flashkat_hf import START_TABLES, GRKANMlp, GroupRational
from flashkat_hf.model import fusing
from flashkat_hf.model.fusing import fuses


@pytest.mark.parametrize("name", START_TABLES)
@pytest.mark.parametrize("num_numerator_groups", [1, 8])
def test_start_is_the_table(name, num_numerator_groups):
    layer = GroupRational(48, num_numerator_groups=num_numerator_groups, init=name)
    assert layer.numerator.shape == (num_numerator_groups, 6)
    assert layer.denominator.shape == (8, 4)
    for row in layer.numerator:
        assert torch.equal(row, torch.tensor(START_TABLES[name].numerator))
    for row in layer.denominator:
        assert torch.equal(row, torch.tensor(START_TABLES[name].denominator))


def test_identity_is_exact_and_learns():
    layer, x = GroupRational(48, init="identity"), torch.randn(4, 48)
    y = layer(x)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert layer.numerator.grad.count_nonzero() == 6
    assert layer.denominator.grad.count_nonzero() == 32


def test_each_group_has_its_own_function():
    layer, x = GroupRational(16, num_groups=2, init="identity"), torch.randn(4, 16)
    with torch.no_grad():
        layer.denominator[1, 0] = 1.0  # y = x / (1 + |x|) in the second group
    assert torch.equal(layer(x)[:, :8], x[:, :8])
    torch.testing.assert_close(layer(x)[:, 8:], torch.nn.functional.softsign(x[:, 8:]))


def test_mlp_is_its_parts():
    mlp, x = GRKANMlp(16, 32).eval(), torch.randn(2, 5, 16)
    expected = mlp.fc2(torch.nn.functional.silu(mlp.fc1(x)))  # act1 starts as identity, act2 as swish
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)  # the swish table is good to 1.2e-6


def test_dropout_acts_before_both_linear_maps_in_training_only():
    mlp, x = GRKANMlp(16, 32, dropout=0.5), torch.randn(2, 16)
    seen = {}
    mlp.fc1.register_forward_pre_hook(lambda _, args: seen.update(fc1=args[0]))
    mlp.fc2.register_forward_pre_hook(lambda _, args: seen.update(fc2=args[0]))
    mlp(x)
    assert (seen["fc1"] == 0).any()
    assert (seen["fc2"] == 0).any()
    mlp.eval()(x)
    assert torch.equal(seen["fc1"], x)


def test_autocast_rounds_the_input_once():
    """Autocast treats the MLP as a plain one: the first activation neither reads nor keeps float32."""
    mlp, seen = GRKANMlp(16, 32), []
    mlp.act1.register_forward_hook(lambda _, args, output: seen.extend([args[0].dtype, output.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(torch.randn(2, 16)).dtype == torch.bfloat16
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_kernels_stand_for_plain_modules_only(monkeypatch):
    """LoRA replaces linear maps and hooks want to be called, so such a module is called as it is."""
    x, linear = torch.randn(2, 16), torch.nn.Linear(16, 16)
    assert not fuses(x, linear)  # on a CPU
    monkeypatch.setattr(fusing, "TRITON_DEVICES", ("cpu",))
    assert fuses(x, linear, GroupRational(16), torch.nn.LayerNorm(16))
    assert not fuses(x, linear, torch.nn.Sequential(torch.nn.Linear(16, 16)))
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        handle = getattr(linear, register)(lambda *args: None)
        assert not fuses(x, linear), register
        handle.remove()
    assert fuses(x, linear)


def test_mlp_with_kernels_is_the_plain_one(device, monkeypatch):
    mlp, x = GRKANMlp(16, 32).to(device), torch.randn(2, 5, 16, device=device)
    monkeypatch.setattr(fusing, "TRITON_DEVICES", (device,))
    results = []
    for fused in (True, False):
        handle = mlp.act2.register_forward_hook(lambda *args: None) if not fused else None
        mlp.zero_grad()
        y = mlp(x)
        y.square().sum().backward()
        results.append([y.detach(), *(parameter.grad.clone() for parameter in mlp.parameters())])
    handle.remove()
    for actual, plain in zip(*results, strict=True):
        torch.testing.assert_close(actual, plain, rtol=1e-4, atol=1e-4)


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"hidden_size \(20\) must be a multiple of num_groups \(8\)"):
        GroupRational(20)
    with pytest.raises(ValueError, match=r"num_numerator_groups \(4\) must be 1 or num_groups \(8\)"):
        GroupRational(16, num_numerator_groups=4)
    with pytest.raises(ValueError, match=r"unknown.*'softplus'.*swish"):
        GroupRational(16, init="softplus")
