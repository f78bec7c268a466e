"""The learned functions as objects and as text: held against the operator, and against closed forms."""

import ctypes
import json
import re
import shutil
import subprocess
import sys

import numpy
import pytest
import sympy
import torch
from helpers import micro_config
from torch import nn

from flashkat_hf import FlashKATForImageClassification, FlashKATModel, GroupRational, SimplifiedActivation
from flashkat_hf import functions as public_functions
from flashkat_hf.checkpoints.functions import LearnedFunction, model_functions
from flashkat_hf.checkpoints.functions_formats import FORMATS, latex, write_functions
from flashkat_hf.checkpoints.functions_inputs import assumed_inputs, noise_images
from flashkat_hf.model.coefficients import SIMPLE_FUNCTIONS
from flashkat_hf.model.op_rational import rational

X = numpy.concatenate([numpy.linspace(-9, 9, 361), [-1e-3, 1e-3]])
NAMES = ["rational", *SIMPLE_FUNCTIONS]


def function(name: str, *coefficients: float, init: str = "swish") -> LearnedFunction:
    return LearnedFunction("layers.0.mlp.act2", 0, name, coefficients, init, assumed_inputs())


@pytest.fixture
def act() -> SimplifiedActivation:
    """Return an activation with a function of every kind, in float64, with coefficients of every size."""
    act = SimplifiedActivation(2 * (len(NAMES) + 1), ["rational", *NAMES], 19).double()
    with torch.no_grad():
        for parameter in act.parameters():
            parameter.copy_(torch.randn_like(parameter) * 10 ** torch.empty_like(parameter).uniform_(-6, 0.5))
    return act


def outputs(act: nn.Module, x: numpy.ndarray) -> numpy.ndarray:
    """Return what the activation itself computes for each group, `(groups, points)`."""
    inputs = torch.tensor(x)[:, None].expand(-1, act.hidden_size)
    return act(inputs).detach().T[::2].numpy()


def assert_alike(actual, exact) -> None:
    """The same to 1e-12 of the largest value: both are float64, in another order of operations."""
    numpy.testing.assert_allclose(actual, exact, rtol=1e-12, atol=1e-12 * numpy.abs(exact).max())


def test_objects_compute_what_the_operator_does(act):
    functions = model_functions(act)
    assert [function.name for function in functions] == ["rational", *NAMES]
    for function, exact in zip(functions, outputs(act, X), strict=True):
        assert_alike(function(X), exact)
        assert_alike(function(torch.tensor(X)).numpy(), exact)
        assert isinstance(function(0.5), float)
        assert function(X.reshape(11, -1)).shape == (11, len(X) // 11)
        step = 1e-5
        numeric = (function(X + step) - function(X - step)) / (2 * step)
        away = numpy.abs(function.slope(X) - numeric) < 1e-4 * (1 + numpy.abs(numeric).max())
        assert away.sum() >= len(X) - 3  # kinks


@pytest.mark.parametrize("rows", [1, 8])
def test_shared_and_separate_numerators(rows):
    act = GroupRational(16, num_numerator_groups=rows).double()
    with torch.no_grad():
        act.numerator.normal_()
        act.denominator.normal_()
    for function, exact in zip(model_functions(act), outputs(act, X), strict=True):
        assert_alike(function(X), exact)


def evaluate_python(text: str, names: list[str]) -> list[numpy.ndarray]:
    space: dict = {}
    exec(text, space)
    return [space[name](X) for name in names]


def from_latex(text: str) -> str:
    """Return an expression of Python for what our LaTeX uses."""
    for pattern, new in (
        (r" \\cdot 10\^\{(-?\d+)\}", r"e\1"),
        (r"\\left\|x\\right\|", "abs(x)"),
        (r"\^\{(\d)\}", r"**\1"),
        (r"\\frac\{(.*)\}\{(1 \+ .*)\}$", r"(\1) / (\2)"),
        (r"\\operatorname\{([\w\\]+)\}_\{(.*?)\}\\left\((.*)\\right\)", r"\1(\3, \2)"),
        (r"\\operatorname\{(\w+)\}\\left\((.*)\\right\)", r"\1(\2)"),
        (r"\\,", "*"),
        (r"\\_", "_"),
    ):
        text = re.sub(pattern, new, text)
    return text


def test_round_trip_through_latex(act):
    space = {
        "relu": nn.functional.relu,
        "leaky_relu": nn.functional.leaky_relu,
        "gelu": nn.functional.gelu,
        "silu": nn.functional.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "x": torch.tensor(X),
    }
    for function, exact in zip(model_functions(act), outputs(act, X), strict=True):
        value = eval(from_latex(latex(function)), space)
        assert_alike(numpy.broadcast_to(numpy.asarray(value), exact.shape), exact)
    text = write_functions(model_functions(act), "latex")
    assert text.startswith("\\begin{align*}\n")
    assert text.count(r"\\") == len(NAMES) + 1


def test_round_trip_through_json(act):
    read = json.loads(write_functions(model_functions(act), "json"))["functions"]
    for one, exact in zip(read, outputs(act, X), strict=True):
        rebuilt = function(one["function"], *one["coefficients"])
        assert_alike(rebuilt(X), exact)
        if one["numerator"] is not None:
            tables = (torch.tensor([one[name]], dtype=torch.float64) for name in ("numerator", "denominator"))
            assert_alike(rational(torch.tensor(X)[:, None], *tables)[:, 0].numpy(), exact)


def test_round_trip_through_sympy(act):
    functions = model_functions(act)
    space: dict = {}
    exec(write_functions(functions, "sympy"), space)
    assert list(space["functions"]) == [function.label for function in functions]
    for function, exact in zip(functions, outputs(act, X), strict=True):
        for expression in map(sympy.sympify, (function.sympy(), space["functions"][function.label])):
            (symbol,) = expression.free_symbols or {sympy.Symbol("x", real=True)}
            values = [float(expression.subs(symbol, sympy.Float(x)).evalf(25)) for x in X[::12]]
            assert_alike(numpy.array(values), exact[::12])


def test_round_trip_through_numpy(act):
    functions = model_functions(act)
    text = write_functions(functions, "numpy")
    names = [function.label for function in functions]
    for value, exact in zip(evaluate_python(text, names), outputs(act, X), strict=True):
        assert value.shape == X.shape
        assert_alike(value, exact)


def test_round_trip_through_c(act, tmp_path):
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "this test compiles C"
    functions = model_functions(act)
    (tmp_path / "f.c").write_text(write_functions(functions, "c"))
    command = [compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC", "-o", "f.so"]
    subprocess.run([*command, "f.c", "-lm"], cwd=tmp_path, check=True, capture_output=True)
    library = ctypes.CDLL(str(tmp_path / "f.so"))
    for function, exact in zip(functions, outputs(act, X), strict=True):
        compiled = getattr(library, function.label)
        compiled.restype, compiled.argtypes = ctypes.c_double, [ctypes.c_double]
        assert_alike(numpy.array([compiled(x) for x in X]), exact)


def test_round_trip_through_the_table(act):
    functions = model_functions(act)
    lines = write_functions(functions, "table", digits=17).splitlines()
    assert len(lines) == 2 + len(functions)
    start = lines[0].index("y =")
    for function, line, exact in zip(functions, lines[1:], outputs(act, X), strict=False):
        if function.rows is not None:
            text = (
                re.sub(r"(\d) (\|?x)", r"\1 * \2", line[start:]).replace("^", "**").replace("|x|", "abs(x)")
            )
            assert_alike(numpy.broadcast_to(eval(text, {"x": X}), X.shape), exact)
    assert "no function has a pole" in lines[-1]
    assert "assumed" in lines[-1]
    assert len(write_functions(functions, "table")) < len("\n".join(lines))


def test_properties_of_a_rational():
    """(x^3 - x) / (1 + x^2): zeros -1, 0, 1; asymptote x; x^2 = sqrt(5) - 2 at the extrema."""
    f = function("rational", 0, -1, 0, 1, 0, 0, 0, 1, 0, 0)
    assert f.poles == ()
    numpy.testing.assert_allclose(f.zeros, [-1, 0, 1], atol=1e-15)
    for line in f.asymptotes:
        assert line == pytest.approx((1, 0))
    at = (5**0.5 - 2) ** 0.5
    assert [place.kind for place in f.extrema] == ["maximum", "minimum"]
    numpy.testing.assert_allclose([place.x for place in f.extrema], [-at, at])
    grid = numpy.linspace(-3, 3, 100001)
    assert f.lipschitz == pytest.approx(numpy.abs(f.slope(grid)).max(), rel=1e-6)
    assert f.num_mattering == 3
    assert f.nearest[0] in ("identity", "relu", "leaky_relu", "gelu", "silu", "zero", "tanh")


def test_asymptotes_differ_on_both_sides_and_may_be_none():
    f = function("rational", 1, 2, 3, 0, 0, 0, 0.5, 0, 0, 0)  # (1 + 2x + 3x^2) / (1 + |x| / 2)
    left, right = f.asymptotes
    for line, x in ((left, -1e7), (right, 1e7)):
        assert f(x) == pytest.approx(line.slope * x + line.intercept, abs=1e-4)
        assert f.slope(x) == pytest.approx(line.slope)
    assert left.slope == pytest.approx(-6)
    assert function("rational", 0, 0, 0, 1, 0, 0, 1, 0, 0, 0).asymptotes == (None, None)
    assert function("rational", 3, 0, 0, 0, 0, 0, 1, 0, 0, 0).asymptotes[1] == pytest.approx((0, 0))


def test_a_kink_is_an_extremum():
    f = function("rational", 1, 0, 0, 0, 0, 0, 1, 0, 0, 0)  # 1 / (1 + |x|)
    assert [tuple(place) for place in f.extrema] == [("maximum", 0.0, 1.0)]
    assert f.lipschitz == pytest.approx(1)
    assert f.zeros == ()


@pytest.mark.parametrize(
    ("name", "coefficients", "zeros", "extrema"),
    [
        ("gelu", (1, 0, 1, 0), [0], [-0.7517915246935645]),
        ("silu", (2, 1, -1, 0), [-0.5], [-1.13923227]),
        ("tanh", (1, 0, 1, -0.5), [0.5493061443340549], []),
        ("sigmoid", (1, 0, 1, 0), [], []),
        ("relu", (-1, 2, 1, -1), [1], []),
        ("leaky_relu", (1, 0, 1, 0.1, 0.1), [-1], []),
        ("leaky_relu", (1, 0, 1, -1, -0.5), [-2, 1], [0]),
        ("polynomial_2", (-1, 0, 1), [-1, 1], [0]),
        ("linear", (1, 2), [-0.5], []),
        ("zero", (), [], []),
    ],
)
def test_properties_of_simple_functions(name, coefficients, zeros, extrema):
    f = function(name, *map(float, coefficients))
    numpy.testing.assert_allclose(f.zeros, zeros, atol=1e-12)
    numpy.testing.assert_allclose([place.x for place in f.extrema], extrema, atol=1e-8)
    grid = numpy.linspace(-3, 3, 200001)
    assert f.lipschitz == pytest.approx(numpy.abs(f.slope(grid)).max(), abs=1e-6)
    for line, x in zip(f.asymptotes, (-1e4, 1e4), strict=True):
        if line is not None:
            assert f(x) == pytest.approx(line.slope * x + line.intercept, abs=1e-6)


def test_distances():
    start = model_functions(GroupRational(8, num_groups=1, init="gelu"))[0]
    assert start.distance_to_start < 1e-7  # the coefficients are float32
    assert start.nearest[0] == "gelu"
    assert start.nearest[1] < 3.5e-3  # what the table promises on [-3, 3]
    moved = function("rational", 0.25, 1, *[0.0] * 8, init="identity")
    assert moved.distance_to_start == pytest.approx(0.25)
    assert moved.nearest == ("identity", pytest.approx(0.25))


def test_inputs_are_those_of_the_images():
    """The first act1 sees a layer norm's output: standard normal, moved and scaled by its parameters."""
    model = FlashKATModel(micro_config(hidden_size=256, num_attention_heads=4)).train()
    with torch.no_grad():
        model.layers[0].norm2.weight[:32] *= 3
        model.layers[0].norm2.bias[-32:] += 10
    state = torch.get_rng_state()
    ranges = torch.tensor([function.range for function in model_functions(model, layer=0)[:8]])
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    low, high = ranges.T
    assert 2.5 < (high - low)[0] / (high - low)[1:7].mean() < 3.5
    assert 8 < (low + high)[-1] / 2 < 12
    assert (low + high)[:7].abs().max() < 4
    values = torch.randn(1000, 8) * 0.01
    (f,) = model_functions(GroupRational(8, num_groups=1), [values[:600], values[600:]])
    low, high = values.flatten().quantile(torch.tensor([0.001, 0.999])).tolist()
    assert f.range == pytest.approx((low, high), rel=0.03)
    assert f.inputs.mean(f.inputs.x**2) == pytest.approx(1e-4, rel=0.03)
    assert f.inputs.source == "images"


def test_noise_has_the_spectrum_of_photographs():
    images = noise_images(8, 1, 64)
    power = torch.fft.rfft2(images).abs().square().mean((0, 1))
    low, high = power[4, 0], power[16, 0]
    assert 6 < low / high < 40  # 16 for amplitudes that fall as 1/f
    assert torch.equal(images, noise_images(8, 1, 64))


def test_names_and_selection():
    model = FlashKATForImageClassification(micro_config())
    functions = public_functions.model_functions(model)
    assert len(functions) == 2 * 2 * 8
    assert functions[11].label == "layer0_act2_group3"
    assert functions[11].module == "flashkat.layers.0.mlp.act2"
    chosen = model_functions(model, layer=1, group=3)
    assert [function.label for function in chosen] == ["layer1_act1_group3", "layer1_act2_group3"]
    other = model_functions(nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), GroupRational(4, 2))}))
    assert [function.label for function in other] == ["body_1_group0", "body_1_group1"]


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="Linear contains no GroupRational"):
        model_functions(nn.Linear(2, 2))
    act = GroupRational(8, num_groups=2)
    with pytest.raises(ValueError, match="batch 0 has values that are not finite"):
        model_functions(act, [torch.full((2, 8), torch.nan)])
    with pytest.raises(ValueError, match="met no inputs"):
        model_functions(act, [])
    with pytest.raises(ValueError, match="there is no layer 0: the layers are not numbered"):
        model_functions(act, layer=0)
    with pytest.raises(ValueError, match=f"unknown format 'tex'; known are {', '.join(FORMATS)}"):
        write_functions(model_functions(act), "tex")
    with pytest.raises(ValueError, match="digits must be 1 to 17, not 18"):
        write_functions(model_functions(act), "table", 18)
    monkeypatch.setitem(sys.modules, "sympy", None)
    with pytest.raises(ValueError, match=r"sympy is missing: pip install 'flashkat_hf\[functions\]'"):
        write_functions(model_functions(act), "sympy")
