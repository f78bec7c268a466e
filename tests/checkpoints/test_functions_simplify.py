"""Rationals replaced by simpler functions: which, how well, and a model that saves, loads and runs."""

import json
import subprocess
import sys

import numpy
import pytest
import torch
from helpers import micro_config
from huggingface_hub.errors import StrictDataclassError

from flashkat_hf import (
    FlashKATConfig,
    FlashKATForImageClassification,
    GroupRational,
    SimplifiedActivation,
    make_image_processor,
)
from flashkat_hf.checkpoints.description import describe
from flashkat_hf.checkpoints.functions import model_functions
from flashkat_hf.checkpoints.functions_inputs import measure_inputs
from flashkat_hf.checkpoints.functions_simplify import fit, simplify
from flashkat_hf.cli import main
from flashkat_hf.model import fusing, layers
from flashkat_hf.model.coefficients import SIMPLE_FUNCTIONS
from flashkat_hf.model.fusing import fuses


@pytest.fixture
def normal() -> list[torch.Tensor]:
    return [1.5 * torch.randn(4096, 8)]


def rationals(*rows: tuple[tuple[float, ...], tuple[float, ...]]) -> GroupRational:
    """Return an activation of 8 channels with a function for each row."""
    act = GroupRational(8, num_groups=len(rows), num_numerator_groups=len(rows))
    with torch.no_grad():
        for index, (numerator, denominator) in enumerate(rows):
            act.numerator[index] = torch.tensor([*numerator, *[0.0] * (6 - len(numerator))])
            act.denominator[index] = torch.tensor([*denominator, *[0.0] * (4 - len(denominator))])
    return act


def test_exact_functions_are_found(normal):
    act = rationals(
        ((), ()), ((0, 1), ()), ((0.5, -2), ()), ((1, 0, 3), ()),
        ((1, 2, 0, -1), ()), ((0, 1, 0.5), (0.3,)), ((0, 1, 0, 1), (0.1, 0.4)),
        ((1, 1, 0, 1, 0, 1), (0.2, 0, 0.3, 2)),
    )  # fmt: skip
    result = simplify(act, normal, 1e-4)
    names = [choice.after.name if choice.replaced else "rational" for choice in result.choices]
    assert names == [
        "zero", "identity", "linear", "polynomial_2", "polynomial_3", "rational_2_1", "rational_3_2",
        "rational",
    ]  # fmt: skip
    assert result.choices[2].after.coefficients == pytest.approx((0.5, -2), abs=1e-5)
    assert isinstance(result.model, SimplifiedActivation)
    x = normal[0]
    torch.testing.assert_close(result.model(x), act(x), rtol=1e-4, atol=2e-4)
    assert torch.equal(result.model(x)[:, 7], act(x)[:, 7])  # the one that is kept is the same to the bit
    assert result.parameters == (80, 2 + 3 + 4 + 4 + 6 + 10)
    assert "1 kept: nothing simpler within 0.0001 of their spread" in str(result)
    assert "parameters of the activations: 80 before, 29 after (51 saved)" in str(result)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid"])
def test_affine_maps_are_found(name):
    """Whatever the maps, what is fitted is the function itself."""
    x = numpy.linspace(-3, 5, 400)
    weight = numpy.full(400, 1 / 400)
    leak = (0.3,) if name == "leaky_relu" else ()
    for p, q, r, s in ((1.0, 0.0, 1.0, 0.0), (-1.7, 1.2, 0.4, -3.0)):
        exact = torch.tensor([p, q, r, s, *leak], dtype=torch.float64)
        y = layers.affine_function(name, torch.tensor(x), exact).numpy()
        found = torch.tensor(fit(name, x, weight, y), dtype=torch.float64)
        fitted = layers.affine_function(name, torch.tensor(x), found).numpy()
        assert numpy.abs(fitted - y).max() < 1e-6 * numpy.ptp(y)


def test_start_tables_are_recognised(normal):
    """The tables stand for these functions to 2e-3 or so over what normal inputs meet; tanh is no sigmoid."""
    for name in ("silu", "gelu", "tanh", "sigmoid"):
        act = GroupRational(8, num_groups=1, init=name)
        (choice,) = simplify(act, normal, 0.01).choices
        assert (choice.replaced, choice.after.name) == (True, name)
        assert choice.error < 0.01
        assert choice.after.coefficients == pytest.approx((1, 0, 1, 0), abs=0.05)


def test_a_name_goes_before_a_polynomial():
    """Near 0 a parabola is as close as GELU with fewer coefficients, but GELU says what the function is."""
    act, inputs = GroupRational(8, num_groups=1, init="gelu"), [0.4 * torch.randn(5000, 8)]
    (choice,) = simplify(act, inputs, 0.04).choices
    x = choice.before.inputs.x
    parabola = numpy.polynomial.Polynomial(
        fit("polynomial_2", x, choice.before.inputs.weight, choice.before(x))
    )
    assert choice.before.distance(parabola) < 0.04 * choice.before.spread
    assert (choice.replaced, choice.after.name) == (True, "gelu")


def test_error_is_the_weighted_one():
    """Only inputs below 1 are met, where this function is a line; far out it is not."""
    act = rationals(((0, 1, 0, 0, 0, 0.01), (0, 0, 0, 0.05)))
    inputs = [0.3 * torch.randn(5000, 8)]
    (choice,) = simplify(act, inputs, 0.02).choices
    assert choice.replaced
    x = inputs[0].double()
    f, g = choice.before(x), choice.after(x)
    assert choice.error == pytest.approx(((f - g).square().mean().sqrt() / f.std()).item(), rel=0.05)
    assert not simplify(act, [3 * torch.randn(5000, 8)], 1e-5).choices[0].replaced


def test_shared_numerators_and_dtype():
    act = GroupRational(16, num_groups=4, init="gelu").to(torch.bfloat16)
    with torch.no_grad():
        act.denominator[2] = torch.tensor([0.3, 0, 0, 2.0])
    result = simplify(act, [torch.randn(2000, 16)], 0.004)
    assert isinstance(result.model, SimplifiedActivation)
    assert result.model.functions[2] == "rational"
    assert result.num_replaced == 3
    x = torch.randn(64, 16, dtype=torch.bfloat16)
    assert result.model(x).dtype == torch.bfloat16
    assert torch.equal(result.model(x)[:, 8:12], act(x)[:, 8:12])
    torch.testing.assert_close(result.model(x), act(x), rtol=0.03, atol=0.03)


def test_simplified_activation_differentiates_and_compiles(normal):
    names = ["rational", *SIMPLE_FUNCTIONS]
    act = SimplifiedActivation(len(names), names).double()
    x = torch.randn(3, len(names), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(act, x)
    expected = act(x)
    torch.testing.assert_close(torch.compile(act, fullgraph=True)(x), expected)
    expected.sum().backward()
    assert all(parameter.grad is not None for parameter in act.parameters())
    identity = SimplifiedActivation(8, ["identity"] * 4)
    assert list(identity.parameters()) == []
    assert identity(normal[0]) is normal[0]


@pytest.fixture
def model() -> FlashKATForImageClassification:
    """Return a model in which some functions are simple and others are not.

    It has few groups, since fitting one group takes most of a second.
    """
    groups = 4
    names = {label: str(label) for label in range(10)}
    config = micro_config(num_groups=groups, num_numerator_groups=groups, id2label=names)
    model = FlashKATForImageClassification(config)
    with torch.no_grad():
        for layer in model.flashkat.layers:
            layer.mlp.fc1.weight *= 20
            layer.mlp.act1.numerator[2:].add_(torch.randn(groups - 2, 6), alpha=0.3)
            layer.mlp.act2.denominator[groups - 3 :] += 0.7
        last = model.flashkat.layers[1].mlp.act2  # stays as it is: it bends too often
        last.numerator.copy_(torch.tensor([0.3, -1, 0, 1, 0, -0.09]).expand(groups, 6))
        last.denominator.copy_(torch.tensor([0, 0, 0, 0.05]).expand(groups, 4))
    return model.eval()


def test_a_simplified_model_saves_loads_and_runs(model, tmp_path):
    images = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = simplify(model, images, 0.02)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.simplified_functions is None
    simplified = result.model
    assert 2 <= result.num_replaced < len(result.choices)
    named = simplified.config.simplified_functions
    assert named["0.act1"][:2] == ["identity", "identity"]
    assert isinstance(simplified.flashkat.layers[0].mlp.act1, SimplifiedActivation)
    with torch.no_grad():
        logits, new = model(images[0]).logits, simplified(images[0]).logits
    assert 0 < (new - logits).std() < 0.1 * logits.std()

    simplified.save_pretrained(tmp_path)
    make_image_processor(32).save_pretrained(tmp_path)
    loaded = FlashKATForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images[0]).logits, new)
    assert loaded.num_parameters() == model.num_parameters() + result.parameters[1] - result.parameters[0]
    torch.save((images[0], new), tmp_path / "expected.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForImageClassification as A\n"
        f"m = A.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        f"x, y = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "assert 'flashkat_hf' not in sys.modules and torch.equal(m(x).logits, y)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "functions are no rationals any more:" in describe(str(tmp_path))

    again = simplify(loaded, images, 0.02)
    assert again.num_replaced == 0
    assert again.model.config.simplified_functions == named
    functions = model_functions(loaded, images)
    assert [f.name for f in functions] == [c.after.name if c.replaced else "rational" for c in result.choices]


def test_kernels_still_serve_the_rationals(model, monkeypatch):
    """An activation that was not replaced is fused as before; a simplified one is called as it is."""
    simplified = simplify(model, [torch.randn(4, 3, 32, 32)], 0.02).model
    x = torch.randn(2, 64)
    monkeypatch.setattr(fusing, "TRITON_DEVICES", ("cpu",))
    acts = {
        name: module
        for name, module in simplified.named_modules()
        if isinstance(module, GroupRational | SimplifiedActivation)
    }
    assert {type(act) for act in acts.values()} == {GroupRational, SimplifiedActivation}
    for act in acts.values():
        assert fuses(x, act) == isinstance(act, GroupRational)
    calls = []
    monkeypatch.setattr(layers, "rational", lambda *args: calls.append(args[1].shape) or args[0])
    mixed = SimplifiedActivation(64, ["rational"] * 3 + ["gelu"] + ["rational"] * 4)
    mixed(x)
    assert [shape[0] for shape in calls] == [3, 4]  # neighbours in one call


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"2.act1": ["zero"] * 8}, r"\['2.act1'\]: the activations are 0.act1, 0.act2 to 1.act2"),
        ({"0.act1": ["zero"] * 7}, "must name a function for each of num_groups=8, not 7"),
        ({"0.act1": ["zero"] * 7 + ["softplus"]}, "unknown function 'softplus'; known are rational, zero"),
        ({"0.act1": "zero"}, "simplified_functions"),
    ],
)  # fmt: skip
def test_bad_config(value, message):
    with pytest.raises(StrictDataclassError, match=message):
        micro_config(simplified_functions=value)
    assert FlashKATConfig().simplified_functions is None


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_tolerance(tolerance, normal):
    with pytest.raises(ValueError, match="the tolerance must be positive, not"):
        simplify(GroupRational(8), normal, tolerance)


def test_scipy_is_missing(monkeypatch, normal):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(
        ValueError, match=r"scipy.optimize is missing: pip install 'flashkat_hf\[functions\]'"
    ):
        simplify(GroupRational(8), normal, 0.1)


@pytest.fixture
def folder(tmp_path, model):
    """Return the folder of a model."""
    model.save_pretrained(tmp_path / "model")
    make_image_processor(32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_commands(folder, tmp_path, capsys):
    """Formulas on the screen and in a file, a picture, and a simplified model with its accuracy."""
    out = str(tmp_path / "simple")
    assert main(["functions", str(folder), "--layer", "0", "--group", "3", "--format", "json"]) == 0
    labels = [one["label"] for one in json.loads(capsys.readouterr().out)["functions"]]
    assert labels == ["layer0_act1_group3", "layer0_act2_group3"]
    assert main(["functions", str(folder), "--format", "c", "-o", f"{out}.c"]) == 0
    assert capsys.readouterr().out == f"{out}.c written: 16 functions\n"
    arguments = [
        str(folder),
        "-o",
        f"{out}.png",
        "--images",
        "digits",
        "--compare",
        str(folder),
        "--layer",
        "0",
    ]
    assert main(["plot", *arguments]) == 0
    assert main(["functions", str(folder), "--simplify", "0.02", "--images", "digits", "-o", out]) == 0
    text = capsys.readouterr().out
    assert "of 16 functions replaced:" in text
    assert "predictions: the same for " in text
    assert "of 360 images (held-out)" in text
    assert "accuracy on them: " in text
    record = json.loads((tmp_path / "simple" / "simplification.json").read_text())
    assert record["tested"]["labelled"] == 360
    assert len(record["functions"]) == 16
    assert main(["info", out]) == 0
    assert main(["plot", out, "-o", f"{out}.svg"]) == 0
    capsys.readouterr()
    assert main(["convert", "--to-original", out, f"{out}.pth"]) == 1
    assert "has simplified functions, which the original code does not know" in capsys.readouterr().err


def test_labels_of_a_folder(folder, images, tmp_path, capsys):
    """Folders without labels that the model has are used without them; train/ measures and val/ tests."""
    command = ["functions", str(folder), "--simplify", "0.1", "-o", str(tmp_path / "out"), "--overwrite"]
    assert main([*command, "--images", str(images)]) == 0
    text = capsys.readouterr().out
    assert "(held-out, without labels that the model has)" in text
    assert "accuracy" not in text
    source = next(path for path in images.rglob("*") if path.is_file())
    (tmp_path / "flat").mkdir()
    for label in range(10):  # as many as the model has labels, but these are no labels
        (tmp_path / "flat" / f"{label}{source.suffix}").write_bytes(source.read_bytes())
    assert main([*command, "--images", str(tmp_path / "flat")]) == 0
    assert "without labels that the model has" in capsys.readouterr().out
    for label in range(2):
        (tmp_path / "digits" / str(label)).mkdir(parents=True)
        source = sorted(path for path in images.rglob("*") if path.is_file())[label]
        (tmp_path / "digits" / str(label) / source.name).write_bytes(source.read_bytes())
    assert main([*command, "--images", str(tmp_path / "digits")]) == 0
    text = capsys.readouterr().out
    assert "of 2 images (the same images that the inputs were measured on)" in text
    assert "accuracy on them" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("functions MODEL --simplify 0", "--simplify 0: the tolerance must be positive"),
        ("functions MODEL --simplify nan", "the tolerance must be positive"),
        ("functions MODEL --simplify 0.1 -o OUT", "--simplify needs --images"),
        ("functions MODEL --simplify 0.1 --images digits", "--simplify needs --output"),
        ("functions MODEL --simplify 0.1 --images digits -o OUT --layer 1", "--layer has no meaning with"),
        ("functions MODEL --simplify 0.1 --images lost -o OUT", "lost is not a folder of images"),
        ("functions MODEL --images BROKEN", "cannot read the image"),
        ("functions MODEL -o MODEL", "exists; --overwrite replaces it"),
        ("functions MODEL -o MODEL --overwrite", "model is a folder"),
        ("functions MODEL -o lost/f.txt", "lost is not a folder"),
        ("functions MODEL --layer 2", "there is no layer 2: the layers are 0 to 1"),
        ("functions MODEL --digits 0", "digits must be 1 to 17, not 0"),
        ("functions BROKEN", "cannot load"),
        ("plot MODEL -o OUT.pdf", "must end with .png, .svg, .html"),
        ("plot MODEL -o OUT.png --group 8", "there is no group 8: the groups are 0 to 3"),
        ("plot MODEL -o OUT.png --compare BROKEN", "cannot load"),
        ("explain MODEL BROKEN/a.png -o OUT.png", "cannot read the image"),
        ("explain MODEL BROKEN/a.png -o OUT.gif", "must end with .png, .svg"),
    ],
)
def test_errors_are_one_line(folder, tmp_path, capsys, arguments, message):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    places = {"MODEL": str(folder), "OUT": str(tmp_path / "out"), "BROKEN": str(tmp_path / "broken")}
    words = arguments.split()
    for name, path in places.items():
        words = [word.replace(name, path) for word in words]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"flashkat {words[0]}: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "model"]


def test_histograms_do_not_depend_on_the_batches():
    values, act = torch.randn(100, 8), GroupRational(8, num_groups=2)
    one, two = (measure_inputs(act, {"": 2}, batches)[""] for batches in ([values], values.split(7)))
    for whole, parts in zip(one, two, strict=True):
        numpy.testing.assert_array_equal(whole.weight, parts.weight)
