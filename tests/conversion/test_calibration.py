"""The fit is the best possible, bounded where nothing was seen; it reaches model, `convert` and command."""

import math
from copy import deepcopy

import pytest
import torch
from helpers import micro_config, original_state, timm_vit
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.optimize import least_squares
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from flashkat_hf import (
    FlashKATForImageClassification,
    FlashKATModel,
    calibrate,
    convert,
    make_image_processor,
)
from flashkat_hf.checkpoints.functions_inputs import bin_centers, histogram
from flashkat_hf.cli import main
from flashkat_hf.conversion import calibration, conversion
from flashkat_hf.conversion.calibration import GUARD, NUM_IMAGES, REACH, find_images, image_batches
from flashkat_hf.conversion.tensor_names import to_flashkat
from flashkat_hf.data.augmentation import evaluation_transform
from flashkat_hf.model.coefficients import start_table
from flashkat_hf.model.reference import rational_value

HEADS = {"num_attention_heads": 2}
X = bin_centers(calibration.FINE)
NORMALS = [
    (0, 1),
    (-0.5, 0.3),
    (-2, 2),
    (0, 0.05),
    (3, 0.1),
    (-6, 0.5),
    (8, 0.3),
]  # mean and deviation of activations


def density(mean: float, deviation: float) -> Tensor:
    """Parts of a normal distribution in the bins `(1, bins)`."""
    weights = torch.exp(-(((X - mean) / deviation) ** 2) / 2) * (1 + X * X).sqrt()
    return (weights / weights.sum())[None]


def gelu_table() -> tuple[Tensor, Tensor]:
    numerator, denominator = (torch.tensor([row], dtype=torch.float64) for row in start_table("gelu"))
    return numerator, denominator


def error(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """r(x) - GELU(x) `(bins, groups)`, by the formula that the model uses."""
    groups = max(len(numerator), len(denominator))
    return (
        rational_value(x[:, None].expand(-1, groups).contiguous(), numerator, denominator)
        - functional.gelu(x)[:, None]
    )


def converted_vit(rows: int) -> tuple[torch.nn.Module, FlashKATForImageClassification]:
    """A random ViT, and the FlashKAT made of it."""
    vit = timm_vit()
    config, state = to_flashkat(vit.state_dict(), {**HEADS, "num_numerator_groups": rows})
    model = FlashKATForImageClassification(config)
    model.load_state_dict(state)
    return vit, model


def pixels(count: int = 48) -> Tensor:
    return torch.randn(count, 3, 32, 32)


@pytest.mark.parametrize("densities", [*([pair] for pair in NORMALS), NORMALS[:3]], ids=str)
def test_fit_is_as_good_as_scipys(densities):
    """One group, and three with a shared numerator; scipy's bounded trust region is another algorithm."""
    weights = torch.cat([density(*pair) for pair in densities]) + GUARD * calibration._uniform(X)
    target = functional.gelu(X)
    numerator, denominator = calibration._fit(X, target, weights)
    assert (denominator >= 0).all()
    seen = weights.sum(0) > 0
    root = weights[:, seen].T.sqrt()

    def residual(theta):
        theta = torch.as_tensor(theta)
        return (root * error(X[seen], theta[None, :6], theta[6:].abs().view(-1, 4))).flatten().numpy()

    start, groups = gelu_table(), len(densities)
    theta = torch.cat((start[0][0], start[1][0].repeat(groups))).numpy()
    lower = [-math.inf] * 6 + [0.0] * 4 * groups
    scipys = least_squares(
        residual, theta + 1e-9, bounds=(lower, math.inf), x_scale="jac", ftol=1e-10, max_nfev=300
    )
    ours = calibration._cost(X, target, weights, numerator, denominator)
    assert ours <= 2 * scipys.cost * (1 + 1e-3)  # both stop when a step gains less than a small part
    assert ours < 0.9 * calibration._cost(X, target, weights, *(table.expand(groups, -1) for table in start))


@pytest.mark.parametrize("pair", NORMALS, ids=str)
def test_bounded_where_nothing_was_seen(pair):
    """The bound that the module states, and what it means for activations within [-9, 9].

    At most 0.1, as the table.
    """
    weights = density(*pair)
    fitted = calibration._fit(X, functional.gelu(X), weights + GUARD * calibration._uniform(X))
    x = torch.linspace(-REACH, REACH, 4001, dtype=torch.float64)
    table_error, fitted_error = error(x, *gelu_table()), error(x, *fitted)
    start_on_activations = calibration._cost(X, functional.gelu(X), weights, *gelu_table())
    bound = table_error.square().mean() + start_on_activations / GUARD
    assert (
        fitted_error.square().mean() <= bound * 1.01
    )  # the integral over bins and the mean over a grid differ
    assert fitted_error.abs().max() <= 0.1
    without = calibration._fit(X, functional.gelu(X), weights + 1e-12 * calibration._uniform(X))
    assert error(x, *without).square().mean() > 2 * fitted_error.square().mean()  # the guard does this


def test_histogram_counts_each_value_in_its_group():
    x = torch.tensor([[-3.0, 0.5, 0.5, 1e9], [7.0, -1e9, 0.25, 40.0]])  # two groups of two channels
    counts = histogram(x[None], 2, "act2", calibration.FINE)
    assert counts.sum(1).tolist() == [4, 4]
    for group, values in enumerate(([-3.0, 0.5, 7.0, -1e5], [0.5, 0.25, 40.0, 1e5])):
        centers = X.repeat_interleave(counts[group]).tolist()
        assert centers == pytest.approx(sorted(values), rel=0.006, abs=0.004)  # half the width of a bin


@pytest.mark.parametrize("rows", [1, 8])
def test_calibration_brings_the_model_closer_to_the_vit(rows, device):
    vit, model = converted_vit(rows)
    vit, model = vit.to(device), model.to(device).train()
    before, images = deepcopy(model.state_dict()), pixels()
    fits = calibrate(model, images.split(20))
    assert all(module.training for module in model.modules())
    model.eval()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    layers = [f"flashkat.layers.{index}.mlp.act2" for index in range(2)]
    assert changed == {f"{name}.{part}" for name in layers for part in ("numerator", "denominator")}
    assert [fit.name for fit in fits] == layers

    images = images.to(device)
    seen = []
    handles = [
        block.mlp.fc1.register_forward_hook(lambda *args: seen.append(args[2].double()))
        for block in vit.blocks
    ]
    with torch.no_grad():
        expected = vit(images)
        for handle in handles:
            handle.remove()
        after = model(images).logits
        for fit, x in zip(fits, seen, strict=True):  # the report, against the ViT's own activations
            for tables, reported in ((before, fit.before), (model.state_dict(), fit.after)):
                y = rational_value(
                    x, *(tables[f"{fit.name}.{part}"].double() for part in ("numerator", "denominator"))
                )
                assert (y - functional.gelu(x)).square().mean().sqrt().item() == pytest.approx(
                    reported, rel=0.01
                )
            assert fit.after < 0.8 * fit.before
            assert (fit.least, fit.largest) == pytest.approx((x.min().item(), x.max().item()), rel=0.006)
        model.load_state_dict(before)
        assert (after - expected).square().mean() < 0.5 * (model(images).logits - expected).square().mean()


def test_separate_numerators_fit_at_least_as_well():
    images, fits = pixels(16), []
    for rows in (1, 8):
        torch.manual_seed(0)
        fits.append(calibrate(converted_vit(rows)[1], [images]))
    for shared, separate in zip(*fits, strict=True):
        assert separate.before == pytest.approx(shared.before, rel=1e-3)
        assert separate.after <= shared.after * 1.001  # the guard's part of the sum is not in these errors


def test_order_batches_and_repetition_do_not_matter():
    _, model = converted_vit(1)
    other, images = deepcopy(model), pixels(24)
    calibrate(model, [images])
    calibrate(other, images.flip(0).split(5))
    for (
        name,
        tensor,
    ) in model.state_dict().items():  # rounding in the products may move a value to the next bin
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
    once = deepcopy(model.state_dict())
    calibrate(model, [images])
    assert all(torch.equal(tensor, once[name]) for name, tensor in model.state_dict().items())


def test_dropout_is_off_while_images_are_seen():
    _, model = converted_vit(1)
    config, images = micro_config(act2_init="gelu", hidden_dropout_prob=0.5), pixels(8)
    other = FlashKATForImageClassification(config).train()
    other.load_state_dict(model.state_dict())
    assert calibrate(other, [images]) == calibrate(model, [images])


def test_nothing_odd_where_no_activation_is_seen():
    _, model = converted_vit(1)
    for layer in model.flashkat.layers:
        layer.mlp.fc1.weight.data *= 0.05
    x = torch.linspace(-REACH, REACH, 4001, dtype=torch.float64)
    for fit in calibrate(model, [pixels(8)]):
        assert max(-fit.least, fit.largest) < 2
        act = model.get_submodule(fit.name)
        assert error(x, act.numerator.detach().double(), act.denominator.detach().double()).abs().max() <= 0.1


def test_a_fit_that_is_no_better_is_not_taken(monkeypatch):
    _, model = converted_vit(1)
    before = deepcopy(model.state_dict())
    worse = [torch.tensor([row], dtype=torch.float64) * 1.01 for row in start_table("gelu")]
    monkeypatch.setattr(calibration, "_fit_layer", lambda *args: (worse[0], worse[1].expand(8, -1)))
    assert all(fit.after == fit.before > 0 for fit in calibrate(model, [pixels(4)]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_form_of_gelu():
    _, model = converted_vit(8)
    other, images = deepcopy(model), pixels(16)
    calibrate(model, [images], approximate="tanh")
    calibrate(other, [images])
    x = torch.linspace(-4, 4, 801, dtype=torch.float64)
    difference = functional.gelu(x, approximate="tanh") - functional.gelu(x)
    numerators, denominators = (
        [net.flashkat.layers[0].mlp.act2.get_parameter(part).detach().double() for net in (model, other)]
        for part in ("numerator", "denominator")
    )
    moved = (error(x, numerators[0], denominators[0]) - error(x, numerators[1], denominators[1])).mean(1)
    assert torch.corrcoef(torch.stack((moved, difference)))[0, 1] > 0.3  # towards the tanh form
    with pytest.raises(ValueError, match="'tnah'"):
        calibrate(model, [images], approximate="tnah")


def test_base_model_in_bfloat16():
    config, state = to_flashkat(timm_vit().state_dict(), HEADS)
    model = FlashKATModel(config).bfloat16()
    model.load_state_dict(
        {n.removeprefix("flashkat."): t for n, t in state.items() if n.startswith("flashkat.")}
    )
    for fit in calibrate(model, [pixels(16).bfloat16()]):
        assert fit.after <= fit.before  # rounded coefficients may be no better, never worse
        assert model.get_submodule(fit.name).numerator.dtype == torch.bfloat16


NAN = torch.full((2, 3, 32, 32), math.nan)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no images"),
        ([torch.zeros(0, 3, 32, 32)], "no images"),
        ([torch.zeros(2, 1, 32, 32)], r"\(batch, 3, height, width\), not \(2, 1, 32, 32\)"),
        ([torch.zeros(3, 32, 32)], "shape"),
        ([torch.zeros(2, 3, 16, 32)], "16x32"),
        ([torch.ones(2, 3, 32, 32), NAN], "batch 1 has pixel values that are not finite"),
        ([{"pixel_values": torch.ones(2, 3, 32, 32)}], "batch 0 is a dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_images_leave_the_model_alone(batches, message):
    _, model = converted_vit(1)
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        calibrate(model, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("act2"))


def test_models_that_cannot_be_calibrated():
    with pytest.raises(ValueError, match="VisionTransformer has no act2"):
        calibrate(timm_vit(), [pixels(2)])
    with pytest.raises(ValueError, match=r"flashkat\.layers\.0\.mlp\.act2 is up to 0\.19 away from GELU"):
        calibrate(FlashKATForImageClassification(micro_config()), [pixels(2)])
    _, model = converted_vit(1)
    model.flashkat.layers[1].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.act2 was not called"):
        calibrate(model, [pixels(2)])
    _, model = converted_vit(1)
    with torch.no_grad():
        model.flashkat.layers[1].mlp.fc1.weight.fill_(math.inf)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.act2 has activations that are not finite"):
        calibrate(model, [pixels(2)])


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for index in range(12):
        path = folder / f"part{index % 2}" / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 36), 60 + index).convert("RGB").save(path)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "broken.png").write_text("no image")
    return folder


def test_images_of_a_folder(photos, monkeypatch):
    found = find_images(photos)
    assert [path.name for path in found] == [
        f"{index:02}.png" for index in (*range(0, 12, 2), *range(1, 12, 2))
    ]
    processor = make_image_processor(32)
    batch = torch.cat(list(image_batches(found, processor)))
    assert batch.shape == (12, 3, 32, 32)
    assert torch.equal(batch[11], evaluation_transform(processor)(Image.open(found[11])))
    monkeypatch.setattr(calibration, "NUM_IMAGES", 4)
    assert find_images(photos) == found[::3]
    monkeypatch.setattr(calibration, "BATCH_SIZE", 3)
    assert [len(batch) for batch in image_batches(found[:7], processor)] == [3, 3, 1]


def test_digits():
    found = find_images("digits")
    assert len(found) == NUM_IMAGES
    assert next(image_batches(found, make_image_processor(16, 1.0))).shape == (
        calibration.BATCH_SIZE,
        3,
        16,
        16,
    )


@pytest.fixture
def vit_file(tmp_path):
    path = tmp_path / "vit.safetensors"
    save_file(timm_vit().state_dict(), path)
    return path


def act2(folder) -> dict[str, Tensor]:
    return {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if ".act2." in name
    }


def test_convert_and_the_command(vit_file, photos, tmp_path, capsys):
    """A folder goes through the result's own image processor; the command gives what the function gives."""
    options = {"settings": HEADS, "transform": "imagenet"}
    report = convert(vit_file, tmp_path / "out", calibrate=photos, **options)
    assert len(report.calibration) == 2
    assert "act2 calibrated" in str(report)
    assert "cost of the calibrated act2" in str(report)
    plain = convert(vit_file, tmp_path / "plain", **options)
    assert "calibrated" not in str(plain)
    assert report.proof.difference < plain.proof.difference
    batches = image_batches(find_images(photos), make_image_processor(32, 32 / 36))  # as convert rounds 0.875
    convert(vit_file, tmp_path / "batches", calibrate=batches, **options)
    arguments = [
        "convert",
        vit_file,
        tmp_path / "command",
        "--calibrate",
        photos,
        "--set",
        "num_attention_heads=2",
    ]
    assert main([*map(str, arguments), "--transform", "imagenet"]) == 0
    assert "act2 calibrated" in capsys.readouterr().out
    for name in ("batches", "command"):
        for key, tensor in act2(tmp_path / name).items():
            assert torch.equal(tensor, act2(tmp_path / "out")[key])
            assert not torch.equal(tensor, act2(tmp_path / "plain")[key])


@pytest.mark.parametrize(("hidden_act", "form"), [("gelu", "none"), ("gelu_pytorch_tanh", "tanh")])
def test_convert_passes_on_the_form_of_gelu(hidden_act, form, tmp_path, monkeypatch):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, hidden_act=hidden_act)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    seen = []
    original = conversion.fit_act2
    monkeypatch.setattr(conversion, "fit_act2", lambda *args: seen.append(args[2]) or original(*args))
    convert(tmp_path / "vit", tmp_path / "out", calibrate=[pixels(4)])
    assert seen == [form]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("nowhere", "nowhere is not a folder of images"),
        ("empty", "empty has no images"),
        ("broken", "broken/cut.png"),
        ([], "no images to calibrate with"),
        ([torch.zeros(1, 3, 48, 48)], "48x48"),
    ],
    ids=str,
)
def test_convert_refuses_and_leaves_nothing(images, message, vit_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "cut.png").write_bytes(b"no image")
    listing = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert(vit_file, "out", settings=HEADS, calibrate=images)
    assert sorted(tmp_path.iterdir()) == listing


def test_convert_refuses_to_calibrate_a_kat(tmp_path):
    save_file(original_state("kat"), tmp_path / "kat.safetensors")
    with pytest.raises(ValueError, match="this is a KAT"):
        convert(tmp_path / "kat.safetensors", tmp_path / "out", settings=HEADS, calibrate=[pixels(2)])
    assert not (tmp_path / "out").exists()
