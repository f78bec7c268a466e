"""The rule that chooses what is left open, and how the best epoch is chosen."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from small_runs import make_images

from flashkat_hf.data.options import SIGNS, Augmentation
from flashkat_hf.data.samples import Examples, ImageData
from flashkat_hf.training.defaults import Facts, complete, shorter_side
from flashkat_hf.training.recipe import RECIPES, Settings, parse
from flashkat_hf.training.selection import select

CLOTHES = Facts(num_images=3_600, side=28, gpu=False)
PHOTOGRAPHS = Facts(num_images=100_000, side=375, gpu=True)


def chosen(facts: Facts, *flags: str) -> Settings:
    settings, _ = complete(parse(["--data", "pictures", *flags]), facts)
    return settings


def test_nothing_is_left_open():
    for facts in (CLOTHES, PHOTOGRAPHS, Facts(0, None, True), Facts(3, 1, False)):
        values = chosen(facts).to_dict()
        open_ = {name for name, value in values.items() if value is None}
        needed = (
            "size image_size patch_size pooling initializer epochs batch_size learning_rate warmup_epochs "
            "flip crop_area"
        )
        assert not open_ & set(f"{needed} holdout evaluate_epochs mixup cutmix".split())
        assert values["crop"] != "auto"


def test_small_images_are_neither_cropped_nor_mirrored():
    settings = chosen(CLOTHES)
    assert replace(settings.augmentation, crop_area=SIGNS.crop_area, crop="moves") == SIGNS
    assert settings.augmentation.crop == "shifts"
    assert (settings.image_size, settings.size) == (28, "micro")
    assert settings.image_size % settings.patch_size == 0
    photographs = chosen(PHOTOGRAPHS).augmentation
    assert (photographs.crop, photographs.flip) == ("random", 0.5)
    assert photographs.crop_area[0] > 0.08


def test_many_small_images_on_a_gpu():
    """What defaults_gpu.jsonl was measured with: Fashion-MNIST, less the tenth that is held out."""
    settings, lines = complete(parse(["--data", "pictures"]), Facts(num_images=54_000, side=28, gpu=True))
    assert (settings.size, settings.batch_size, settings.epochs) == ("tiny", 512, 148)
    assert "--image_size 28 --patch_size 4: images of 28 pixels, 7 x 7 patches on a GPU" in lines


@pytest.mark.parametrize(("side", "image_size"), [(8, 16), (20, 20), (28, 28), (30, 32), (32, 32), (50, 52)])
def test_the_size_of_small_images(side, image_size):
    assert chosen(replace(CLOTHES, side=side)).image_size == image_size


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("size", "tiny"), ("image_size", 56), ("patch_size", 14), ("pooling", "cls"), ("epochs", 3),
        ("initializer", "trunc_normal"), ("batch_size", 7), ("learning_rate", 0.5),
        ("holdout", 0.25), ("evaluate_epochs", 3), ("mixup", 0.3),
        ("layer_decay", 0.5), ("warmup_epochs", 1.5),
    ],
)  # fmt: skip
def test_what_is_given_stays(flag, value):
    settings = chosen(CLOTHES, f"--{flag}", str(value))
    assert getattr(settings, flag) == value
    others = {"size", "image_size", "patch_size", "pooling", "epochs", "batch_size", "holdout"} - {flag}
    assert all(getattr(settings, name) is not None for name in others)


@pytest.mark.parametrize("image_size", [16, 30, 32, 37, 96, 224])
def test_patches_fill_images_of_a_size_that_is_given(image_size):
    for facts in (CLOTHES, PHOTOGRAPHS):
        settings = chosen(facts, "--image_size", str(image_size))
        assert settings.image_size == image_size
        assert image_size % settings.patch_size == 0
        assert chosen(facts, "--patch_size", "5").image_size % 5 == 0


def test_augmentation_is_given_one_by_one():
    assert chosen(CLOTHES, "--flip", "0.5").augmentation.crop == "shifts"
    assert chosen(CLOTHES, "--flip", "0.5").augmentation.flip == 0.5
    cropped = chosen(CLOTHES, "--crop", "random").augmentation
    assert (cropped.crop, cropped.flip) == ("random", 0.0)
    assert chosen(CLOTHES, "--crop", "random", "--crop_area", "0.6", "1").augmentation.crop_area == (0.6, 1.0)
    settings = Settings(data="pictures")
    settings.augmentation = replace(settings.augmentation, erasing=0.25)
    assert complete(settings, CLOTHES)[0].augmentation.erasing == 0.25
    settings.augmentation = Augmentation()
    assert complete(settings, CLOTHES)[0].augmentation == Augmentation()


def test_each_choice_is_said_with_its_reason_and_what_is_given_is_not():
    _, lines = complete(parse(["--data", "pictures", "--epochs", "4"]), CLOTHES)
    assert all(line.startswith("--") and ": " in line for line in lines)
    text = "\n".join(lines)
    assert "--epochs" not in text
    assert "whether they may be mirrored is not known, --flip 0.5 mirrors half" in text


def test_a_checkpoint_keeps_its_shape():
    settings = chosen(CLOTHES, "--model", "m")
    assert (settings.size, settings.image_size, settings.patch_size, settings.pooling) == (None,) * 4
    assert (settings.mixup, settings.cutmix, settings.layer_decay) == (0, 0, 1)


@pytest.mark.parametrize(("width", "rate"), [(32, 2e-3), (64, 2e-3), (192, 7e-4), (768, 2e-4), (None, 2e-4)])
def test_wider_checkpoints_learn_at_a_lower_rate(width, rate):
    assert chosen(replace(CLOTHES, width=width), "--model", "m").learning_rate == pytest.approx(rate)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_packaged_recipe_is_not_changed(path):
    settings = parse(["--recipe", path.stem, "--data", "pictures"])
    assert complete(settings, CLOTHES) == (settings, [])
    assert settings.holdout == 0


@pytest.mark.parametrize(("images", "share"), [(20, 1), (3_600, 3), (100_000, 8), (100, 64)])
def test_processes_can_share_a_batch(images, share):
    for gpu in (False, True):
        assert chosen(Facts(images, 28, gpu, share)).batch_size % share == 0


def test_the_median_of_the_shorter_sides():
    sides = [(28, 40), (30, 30), (500, 31)]
    images = [Image.new("L", size) for size in sides for _ in range(50)]
    data = ImageData(Examples(images, [0] * 150), Examples([], []), ["a"], "")
    assert shorter_side(data) == 30
    broken = ImageData(Examples([b"no image"] * 5, [0] * 5), Examples([], []), ["a"], "")
    assert shorter_side(broken) is None


@pytest.mark.parametrize(
    ("per_class", "holdout", "kind"),
    [(50, None, "held-out"), (50, 0.0, "test"), (1, None, "last"), (3, 0.3, "last")],
)
def test_how_the_epoch_is_chosen(per_class, holdout, kind):
    labels = [label for label in (0, 1) for _ in range(per_class)]
    data = ImageData(Examples(["x"] * len(labels), labels), Examples(["y"], [0]), ["a", "b"], "")
    found, selection = select(Settings(holdout=holdout), data)
    assert selection.kind == kind
    assert (found.val is not None) == (kind == "held-out")
    third = replace(data, val=Examples(["z"], [0]))
    selection = select(Settings(holdout=holdout), third)[1]
    assert selection.kind == "val"
    assert ("--holdout is not used" in selection.reason) == bool(holdout)


def small(images: Path, output: Path, **others) -> Settings:
    values = {"size": "micro", "epochs": 3, "batch_size": 8, "workers": 0, "log_steps": 1} | others
    return Settings(data=str(images), output=output, **values)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Train on the CPU and return the summary."""
    from accelerate.state import AcceleratorState, GradientState

    from flashkat_hf.training import train

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(images: Path, name: str = "run", **others) -> dict | None:
        try:
            return train(small(images, tmp_path / name, **others))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()

    return run


def test_the_test_images_are_looked_at_once(tmp_path, trained, monkeypatch, capsys):
    from flashkat_hf.training import trainer as loop

    counts, evaluate = [], loop.measure

    def counted(model, batches, *others, **options):
        result = evaluate(model, batches, *others, **options)
        counts.append(result["count"])
        return result

    monkeypatch.setattr(loop, "measure", counted)
    summary = trained(make_images(tmp_path / "images", train=40, val=7), holdout=0.25)
    assert counts == [20, 20, 20, 14]
    assert (summary["num_train_images"], summary["num_test_images"]) == (60, 14)
    assert (summary["evaluated_on"], summary["epoch_chosen"]) == (
        "test images",
        "on held-out training images",
    )
    assert summary["num_selection_images"] == 20
    printed = capsys.readouterr().out
    assert (
        "the epoch is chosen on 20 training images, --holdout 0.25; the test images are looked at once"
        in printed
    )
    last = json.loads((tmp_path / "run" / "last" / "summary.json").read_text())
    assert (last["evaluated_on"], last["num_test_images"]) == ("held-out training images", 20)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = max(line["top1"] for line in lines if "top1" in line)
    assert summary["selection_top1"] == best


def test_the_accuracy_is_that_of_the_best_epochs_weights(tmp_path, trained):
    from flashkat_hf.training.commands import evaluate

    images = make_images(tmp_path / "images", train=40, val=7)
    summary = trained(images, ema_decay=0.9, learning_rate=1e-4)
    shown = json.loads(
        evaluate([str(tmp_path / "run" / "best"), "--data", str(images), "--json", "--no-progress"])
    )
    assert (
        shown["top1"]
        == summary["top1"]
        == json.loads((tmp_path / "run/best/summary.json").read_text())["top1"]
    )


def test_one_image_a_class_takes_the_last_epoch(tmp_path, trained, capsys):
    summary = trained(make_images(tmp_path / "images", train=1, val=3), batch_size=None)
    assert (summary["best_epoch"], summary["epoch_chosen"], summary["num_test_images"]) == (
        3,
        "the last one",
        6,
    )
    printed = capsys.readouterr().out
    assert "too few training images to hold any out (2): the last epoch is taken" in printed
    assert printed.count("test accuracy") == 1
