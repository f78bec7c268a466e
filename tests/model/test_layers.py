"""GroupRational and GRKANMlp."""

import pytest
import torch
from numpy.polynomial.polynomial import polyval

from flashkat_hf import START_TABLES, GRKANMlp, GroupRational, rational
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


LAST = {"memory_format": torch.channels_last}


@pytest.mark.parametrize("dim", [1, -3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "long rows", "many long rows"])
def test_channels_first_is_channels_last_moved(dim, layout, device, monkeypatch):
    """A width that equals the number of channels must not be taken for them."""
    if "long rows" in layout:
        monkeypatch.setattr("flashkat_hf.model.layers.MAX_ROW", 10)
    if "many" in layout:
        monkeypatch.setattr("flashkat_hf.model.layers.FEW_ROWS", 1)
    layer = GroupRational(16, 4, 4, "gelu", dim=dim).to(device)
    with torch.no_grad():
        layer.numerator.mul_(torch.rand_like(layer.numerator))
        layer.denominator.mul_(torch.rand_like(layer.denominator))
    x = torch.randn(2, 16, 3, 16, device=device)
    x = {"channels_last": lambda: x.contiguous(**LAST), "strided": lambda: x.repeat(2, 1, 1, 1)[::2]}.get(
        layout, lambda: x
    )()
    grad, results = torch.randn_like(x), []
    for function in (
        layer,
        lambda x: rational(x.movedim(1, -1), layer.numerator, layer.denominator).movedim(-1, 1),
    ):
        leaf = x.detach().requires_grad_()
        y = function(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, layer.numerator, layer.denominator], grad)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)  # sums of 200 in another order
    assert torch.equal(layer(x), results[0][0])
    if layout == "channels_last":
        assert results[0][0].is_contiguous(**LAST)


def test_channels_in_another_dimension_are_refused():
    with pytest.raises(ValueError, match=r"hidden_size is 16, but x of shape \(2, 16, 4, 4\).*dimension -1"):
        GroupRational(16)(torch.randn(2, 16, 4, 4))
    with pytest.raises(ValueError, match=r"x of shape \(2, 16\) has another size in dimension 3"):
        GroupRational(16, dim=3)(torch.randn(2, 16))


def test_device_dtype_and_reset():
    layer = GroupRational(16, dtype=torch.float64, device="meta")
    assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(torch.float64, "meta")}
    layer = GroupRational(16, init="gelu")
    start = [parameter.clone() for parameter in layer.parameters()]
    torch.nn.init.ones_(layer.numerator)
    torch.nn.init.ones_(layer.denominator)
    layer.reset_parameters()
    assert all(map(torch.equal, layer.parameters(), start))


@pytest.mark.parametrize("form", ["terms", "sum"])
@pytest.mark.parametrize("degrees", [(3, 2), (5, 4), (7, 6)], ids=str)
def test_other_degrees_and_forms(degrees, form, device):
    """Both denominators in use, evaluated by numpy's polynomials; gradients against finite differences."""
    layer = GroupRational(8, 2, 2, "identity", degrees=degrees, form=form, dtype=torch.float64, device=device)
    x = torch.randn(3, 8, dtype=torch.float64, device=device)
    assert torch.equal(layer(x), x)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    for group in range(2):
        a, b = ([*table[group].tolist()] for table in (layer.numerator, layer.denominator))
        piece = x[:, 4 * group : 4 * group + 4].cpu().numpy()
        if form == "terms":
            q = polyval(abs(piece), [1, *(abs(value) for value in b)])
        else:
            q = 1 + abs(polyval(piece, [0, *b]))
        expected = torch.from_numpy(polyval(piece, a) / q)
        torch.testing.assert_close(layer(x)[:, 4 * group : 4 * group + 4].cpu(), expected)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x.requires_grad_(), *layer.parameters()))


@pytest.mark.parametrize("name", START_TABLES)
def test_tables_serve_the_other_form(name):
    x = torch.linspace(-8, 8, 1601, dtype=torch.float64)[:, None].expand(-1, 2)
    both = [GroupRational(2, 1, init=name, form=form, dtype=torch.float64)(x) for form in ("terms", "sum")]
    assert (both[0] - both[1]).abs().max() < 2e-3


@pytest.mark.parametrize(
    ("function", "degrees", "form", "bound"),
    [
        # scripts/fit_start_tables.py: no rational of degree (5, 4) has a smaller largest error than 2.4e-3
        (torch.nn.functional.gelu, (5, 4), "terms", 5e-3),
        (torch.nn.functional.gelu, (7, 6), "sum", 1e-3),
        (torch.sin, (5, 4), "terms", 3e-3),
        (lambda x: x**3 / (1 + x**2), (3, 2), "terms", 1e-5),  # it is one of them
        (lambda x: x / (1 + (x / 2 - x**2 / 8).abs()), (3, 2), "sum", 1e-5),
    ],
)
def test_fit(function, degrees, form, bound):
    layer = GroupRational(8, 4, 4, "identity", degrees=degrees, form=form)
    error = layer.fit(function)
    x = torch.linspace(-5, 5, 997)[:, None].expand(-1, 8)
    assert (layer(x) - function(x)).abs().max() < bound
    assert error < bound
    samples = torch.rand(40, 50) * 10 - 5
    assert layer.fit(function(samples), samples) < bound


def test_fit_refuses_what_it_cannot_fit():
    layer = GroupRational(8)
    for target, x, message in (
        (torch.zeros(20), torch.zeros(21), r"shape \(20,\), but x has \(21,\)"),
        (torch.zeros(9), torch.zeros(9), "9 samples are too few for the 10 coefficients"),
        (torch.log, None, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.fit(target, x)


def test_range_of_float32():
    """The docstring of `rational` says how far float32 goes; there the value is on the asymptote."""
    layer, x = GroupRational(8, init="gelu"), torch.tensor([-5e7, 5e7])[:, None].expand(-1, 8)
    slope = START_TABLES["gelu"].numerator[5] / START_TABLES["gelu"].denominator[3]
    torch.testing.assert_close(layer(x), slope * x, rtol=1e-5, atol=0)


def test_a_rational_of_another_form_is_never_fused(monkeypatch):
    monkeypatch.setattr(fusing, "TRITON_DEVICES", ("cpu",))
    x = torch.randn(2, 16)
    assert not fuses(x, GroupRational(16, dim=1))
    assert not fuses(x, GroupRational(16, form="sum"))
    assert not fuses(x, GroupRational(16, init="identity", degrees=(3, 2)))


def test_mlp_of_odd_width_without_biases(device, monkeypatch):
    mlp, x = GRKANMlp(172, 86, num_groups=2, bias=False).to(device), torch.randn(2, 172, device=device)
    monkeypatch.setattr(fusing, "TRITON_DEVICES", (device,))
    assert sorted(name for name, _ in mlp.named_parameters() if "fc" in name) == ["fc1.weight", "fc2.weight"]
    expected = torch.nn.functional.silu(x @ mlp.fc1.weight.T) @ mlp.fc2.weight.T
    torch.testing.assert_close(mlp(x), expected, rtol=1e-3, atol=1e-4)  # the swish table's 1.2e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"degrees": (3, 2)}, r"'swish' is of degree 5 over 4 and cannot start.*3 over 2"),
        ({"degrees": (0, 4)}, r"degrees \(\(0, 4\)\) must be two numbers, each at least 1"),
        ({"form": "C"}, r"form \('C'\) must be one of terms, sum"),
        ({"num_groups": 0}, r"must be a multiple of num_groups \(0\)"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupRational(16, **arguments)
