"""Settings, the recipes of the repository, and what is refused."""

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from flashkat_hf.data.options import Augmentation
from flashkat_hf.data.sources import open_data
from flashkat_hf.training.recipe import DATA, FREE_NAMES, NAMES, RECIPES, Settings, parse, read_recipe


def parsed(*arguments, recipe: str = "finetune-digits") -> Settings:
    return parse(["--recipe", recipe, *map(str, arguments)])


@pytest.mark.parametrize(("size", "drop_path"), [("tiny", 0.1), ("small", 0.1), ("base", 0.4)])
def test_pretraining_is_the_papers(size, drop_path):
    """The table in effect of the original code, item by item."""
    settings = parsed("--data", "imagenet", recipe=f"pretrain-{size}")
    assert (settings.size, settings.drop_path) == (size, drop_path)
    assert (settings.batch_size, settings.epochs) == (1024, 300)
    assert (settings.beta1, settings.beta2, settings.eps) == (0.9, 0.999, 1e-8)
    assert (settings.weight_decay, settings.decay_coefficients, settings.layer_decay) == (0.05, True, None)
    assert (settings.learning_rate, settings.min_learning_rate) == (1e-3, 0)
    assert (settings.warmup_epochs, settings.warmup_learning_rate, settings.schedule) == (5, 1e-5, "epoch")
    assert settings.clip_norm is None
    assert (settings.mixup, settings.cutmix, settings.mix_switch, settings.mix_probability) == (
        0.8,
        1.0,
        0.5,
        1.0,
    )
    assert (settings.label_smoothing, settings.ema_decay, settings.precision) == (0.1, 0.9999, "bf16")
    assert settings.augmentation == Augmentation(
        crop="random", crop_area=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), interpolation="random", flip=0.5,
        rand_augment="rand-m9-mstd0.5", color_jitter=0.0, erasing=0.25,
    )  # fmt: skip


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_sets_what_it_says(path):
    values = parsed("--recipe", path.stem).to_dict()
    for name, text in read_recipe(path).items():
        said = yaml.safe_load(path.read_text())[name]  # which these write as YAML understands it
        expected = tuple(said) if isinstance(said, list) else said
        assert values[name] == (None if text == "none" else type(values[name])(expected)), name


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("epochs: 010", "epochs", 10),  # not 8, as YAML 1.1 has it
        ("seed: 1_0", "seed", 10),
        ("resume: on", "resume", True),
        ("compile: off", "compile", False),
        ("label_smoothing: .5", "label_smoothing", 0.5),
        ("data: 010", "data", "010"),
    ],
)
def test_a_recipe_is_read_as_the_command_line(tmp_path, text, name, value):
    (tmp_path / "mine.yaml").write_text(text)
    assert getattr(parsed("--recipe", tmp_path / "mine.yaml"), name) == value


def test_the_command_line_goes_before_the_recipe():
    settings = parsed("--learning_rate", "1e-4", "--epochs=7", "--flip", 0.25, "--crop-area", 0.5, 1)
    assert (settings.learning_rate, settings.epochs, settings.size) == (1e-4, 7, "micro")
    assert settings.augmentation == Augmentation(
        "moves", (0.5, 1.0), flip=0.25, rand_augment=None, erasing=0.0
    )


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "epochs: 3\nlearning_rate: 2e-4\nrand_augment: null\ntrackers: [wandb, trackio]\n"
        "model: null\nresume: yes"
    )
    settings = parsed("--recipe", path)
    assert (settings.epochs, settings.learning_rate, settings.augmentation.rand_augment) == (3, 2e-4, None)
    assert (settings.trackers, settings.model, settings.resume) == (["wandb", "trackio"], None, True)


def test_texts_are_what_is_written(tmp_path):
    """Where YAML would make a truth value, a number or a date of them."""
    path = tmp_path / "mine.yaml"
    names = ["no", "yes", "On", "010", "1.0", "0x1F", "2020-01-01", "12:30", "null"]
    text = f"precision: no\nclass_names: [{', '.join(names[:-1])}, 'null']\nsubset: 2024\noutput: off\n"
    path.write_text(f"{text}compile: no\nresume: on\nepochs: 3\n")
    settings = parsed("--recipe", path)
    assert (settings.precision, settings.class_names, settings.subset) == ("no", names, "2024")
    assert (settings.output, settings.compile, settings.resume) == (Path("off"), False, True)


def test_defaults_that_depend_on_others(tmp_path):
    assert parsed().output == Path("runs/digits")
    assert parsed("--data", tmp_path / "photos").output == Path("runs/photos")
    assert parsed().learning_rate == 3e-3
    assert (parsed("--model", "m").learning_rate, parsed("--model", "m").size) == (1e-4, None)
    assert parsed("--data", "photos", recipe="finetune").learning_rate == 5e-4
    assert parsed("--data", "photos", "--model", "m", recipe="finetune").learning_rate == 1e-4
    assert parsed("--data", "photos", recipe="finetune").size == "tiny"
    assert parsed("--data", "photos", "--model", "m", recipe="finetune").size is None
    recipe = tmp_path / "fresh.yaml"
    recipe.write_text("size: micro\ninitializer: variance_preserving\nepochs: 3\n")
    settings = parse(["--recipe", str(recipe), "--model", "m"])
    assert (settings.size, settings.initializer, settings.epochs) == (None, None, 3)
    assert [parsed("--epochs", n).warmup_epochs for n in (1, 20, 300)] == [0.1, 2, 5]


def test_flags_without_a_value():
    assert parsed("--compile", "--resume", "--no_cuda_graphs").compile is True
    settings = parsed("--compile", "false", "--resume", "--no-cuda-graphs")
    assert (settings.compile, settings.resume, settings.cuda_graphs) == (False, True, False)
    assert (parsed().compile, parsed().resume, parsed().cuda_graphs) == (None, False, True)


def test_the_users_home_is_found(monkeypatch, tmp_path):
    """A shell expands `--output ~/x`, and not `--output=~/x`, nor what a recipe has."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("data: ~/photos")
    settings = parsed("--recipe=~/mine.yaml", "--output=~/runs/x", "--model=~/best")
    assert (settings.output, settings.data) == (tmp_path / "runs/x", str(tmp_path / "photos"))
    assert settings.model == str(tmp_path / "best")


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_help_has_every_setting_in_a_group_and_each_default_once(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # one line for each setting
    with pytest.raises(SystemExit) as end:
        parse(["--help"], command, "Some words.")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: flashkat {command} ")
    groups = dict(part.split(":\n", 1) for part in text.split("\n\n")[2:])
    assert list(groups) == [
        "options", "data and output", "model", "optimisation", "what is shown and kept", "augmentation"
    ]  # fmt: skip
    lines = {line.split()[0]: line for part in groups.values() for line in part.splitlines()}
    assert {f"--{name}" for name in NAMES} <= lines.keys()
    for line in lines.values():
        assert line.count("default:") <= 1
        assert "None" not in line
    assert lines["--learning_rate"].endswith("the highest; default: by the data and the model")
    assert lines["--weight_decay"].endswith("of matrices and rational coefficients (default: 0.05)")
    assert "  --epochs N  " in groups["optimisation"]


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"max_steps": 3},
        {"data": "photos"},
        {"data": "photos", "model": "m", "epochs": 20, "output": Path("runs/mine")},
        {"data": "photos", "size": "small", "lora_rank": 4},
        {"model": "m"},
    ],
)
def test_from_python_a_run_is_that_of_the_script(words, tmp_path):
    """Settings are the home of defaults: a recipe that says nothing changes none."""
    flags = [part for name, value in words.items() for part in (f"--{name}", value)]
    assert Settings(**words) == parse([str(flag) for flag in flags])
    packaged = parsed(*flags, recipe="finetune" if "data" in words else "finetune-digits")
    assert Settings(**{"fit_defaults": False, **words}) == packaged
    (tmp_path / "mine.yaml").write_text("epochs: 20")
    assert parsed("--recipe", tmp_path / "mine.yaml", *flags) == Settings(**{"epochs": 20, **words})


def test_the_recipe_of_photographs_may_be_had_for_the_digits():
    settings = parsed("--recipe", "finetune")
    assert settings.augmentation == Augmentation(rand_augment=None, erasing=0.0)
    assert settings.augmentation.crop == "random"


def test_settings_are_saved_flat():
    values = Settings().to_dict()
    assert set(values) == set(NAMES)
    assert {item.name for item in fields(Augmentation)} <= set(values)


def test_what_is_known_of_a_setting_stands_at_its_field():
    marks = {item.name: item.metadata["marks"] for item in fields(Settings) if item.init}
    taken = {name for name in marks if DATA in marks[name]}
    assert taken <= set(inspect.signature(open_data).parameters)
    assert {"output", "workers", "trackers", "push_to"} <= FREE_NAMES
    assert not FREE_NAMES & (taken | {"seed", "batch_size", "learning_rate", "model"})
    assert Settings(data="photos", subset="b", train_size=7).data_options() == {
        "subset": "b",
        "train_size": 7,
        "shuffle_buffer": 1000,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: 0 must be at least 1"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--learning_rate", "nan"], "--learning_rate: nan must be"),
        (["--drop_path", "1"], "--drop_path: 1.0 must be at least 0 and below 1"),
        (["--mix_switch", "1.5"], "--mix_switch: 1.5 must be at least 0 and at most 1"),
        (["--seed", "-1"], "--seed: -1 must be at least 0"),
        (["--size", "huge"], "argument --size: invalid choice: 'huge'"),
        (
            ["--model", "a", "--size", "tiny"],
            "--size: tiny is for a fresh model, but --model a has its own",
        ),
        (["--head", "keep"], "--head: keep is for --model"),
        (["--lora_rank", "4", "--freeze_backbone"], "--freeze_backbone contradicts --lora_rank 4"),
        (["--lora_modules", "qkv"], "--lora_modules: qkv are for --lora_rank, which is not given"),
        (["--warmup_epochs", "50"], "--warmup_epochs: 50 must be below --epochs 50"),
        (["--resume", "--overwrite"], "--resume contradicts --overwrite"),
        (["--trackers", "pigeon"], "--trackers: pigeon is unknown"),
        (["--micro_batch", "5"], "--batch_size: 64 must be a multiple of --micro_batch 5"),
        (
            ["--model", "a", "--patch_size", "4"],
            "--patch_size: 4 is for a fresh model, but --model a has its own",
        ),
        (
            ["--model", "a", "--initializer", "trunc_normal"],
            "--initializer: trunc_normal is for a fresh model, but --model a has its own",
        ),
        (["--compile", "perhaps"], "argument --compile: 'perhaps' is neither true nor false"),
        (["--lr", "3"], "unknown arguments: --lr 3; perhaps --learning_rate$"),
        (["--num-train-epochs=3"], "unknown arguments: --num-train-epochs=3; perhaps --epochs$"),
        (["--per_device_train_batch_size", "3"], "3; perhaps --batch_size$"),
        (["--zzz"], "unknown arguments: --zzz$"),
        (["--learning_rat", "3"], "unknown arguments: --learning_rat 3; perhaps --learning_rate"),
        (
            ["--recipe", "fine"],
            "--recipe: fine is no file and none of finetune, finetune-digits, pretrain-base,",
        ),
        (["--rand_augment", "much"], "rand_augment 'much' must be timm's"),
        (["--crop", "none"], "crop 'none' is not one of auto, random, moves"),
        (["--crop_area", "0.5"], "argument --crop_area.*: expected 2 arguments"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        parsed(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 3", "mine.yaml: learning_rat is no setting; perhaps learning_rate"),
        ("- 3", "mine.yaml must hold names and values"),
        ("a: [", "mine.yaml: while parsing"),
        ("epochs: 2.5", "argument --epochs: invalid int value: '2.5'"),
        ("resume: perhaps", "argument --resume"),
        ("3: 4", "mine.yaml: 3 is no setting"),
        ("epochs: [1, 2]", r"mine.yaml: epochs is one value, not \['1', '2'\]"),
        ("class_names: [a, null]", "class_names has an empty entry; null and ~ as names need quotes"),
        ("trackers: {a: b}", "mine.yaml: trackers is one value, not {'a': 'b'}"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        parsed("--recipe", tmp_path / "mine.yaml")
    assert "\n" not in str(caught.value)


def test_recipes_are_what_yaml_says():
    """No number is a string to YAML, as 1e-3 would be."""
    for path in RECIPES.glob("*.yaml"):
        for name, value in yaml.safe_load(path.read_text()).items():
            kind = {item.name: item.type for item in fields(Settings)}.get(name)
            assert kind not in (int, float) or isinstance(value, int | float), (path, name)
