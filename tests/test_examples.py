"""The example scripts as a user runs them, with small budgets."""

import importlib.util
import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from flashkat_hf.data import load_digits

ROOT = Path(__file__).parent.parent
PYTHONPATH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {  # one thread: tests may share the cores with others
    **os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
}  # fmt: skip
EPOCHS = 8  # of 45 steps: ten seconds


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


finetune, classify = load_script("finetune"), load_script("classify")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def train() -> Iterator:
    """The training script in this process, with all that it seeds and sets put back."""
    states = random.getstate(), numpy.random.get_state()
    yield lambda *arguments: finetune.main(finetune.parse([str(argument) for argument in arguments]))
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def command(*parts, cwd=ROOT) -> subprocess.CompletedProcess:
    parts = [str(part) for part in parts]
    return subprocess.run(parts, capture_output=True, text=True, check=False, cwd=cwd, env=ENVIRONMENT)


def assert_accuracy_is_the_pipelines(output: Path, printed: str) -> None:
    """The accuracy that was printed and noted is the pipeline's on the held-out images, to the last one."""
    test = load_digits().test
    answers = pipeline("image-classification", model=str(output))(list(test.images), top_k=1)
    correct = sum(answer[0]["label"] == str(label) for answer, label in zip(answers, test.labels, strict=True))
    assert f"test accuracy {correct / 360:.2%} on 360 images" in printed
    assert metrics(output)[-1]["test_accuracy"] == correct / 360


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A model that saw the digits a few times, and what the script printed."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    return output, command(
        sys.executable, "examples/finetune.py", "--output", output, "--epochs", EPOCHS, "--batch_size", 32
    )


@pytest.fixture
def photos(tmp_path) -> Path:
    """An image folder of two classes, in one colour each."""
    for split, count in (("train", 6), ("val", 3)):
        for name, colour in (("green", (40, 160, 60)), ("red", (190, 50, 40))):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.effect_noise((30, 24), 60).convert("RGB")
                Image.blend(image, Image.new("RGB", image.size, colour), 0.7).save(
                    tmp_path / "photos" / split / name / f"{i}.png"
                )
    return tmp_path / "photos"


def test_it_learns(trained):
    output, result = trained
    assert result.returncode == 0, result.stderr
    lines = metrics(output)
    assert lines[-1]["test_accuracy"] > 0.6  # chance is 0.1; written when this gave 0.84, and the default budget 0.99
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert [line["step"] for line in lines] == [45 * (epoch + 1) for epoch in range(EPOCHS)]


def test_the_saved_folder_gives_the_printed_accuracy(trained):
    output, result = trained
    assert_accuracy_is_the_pipelines(output, result.stdout)
    model = AutoModelForImageClassification.from_pretrained(output)
    assert model.config.label2id == {str(i): i for i in range(10)}
    assert AutoImageProcessor.from_pretrained(output).crop_size["height"] == model.config.image_size
    assert {path.name for path in output.iterdir()} == finetune.SAVED
    assert [path.name for path in output.parent.iterdir()] == ["digits"]  # nothing is left beside it


def test_the_next_command_is_printed_and_works(trained):
    output, result = trained
    line = result.stdout.splitlines()[-1]
    assert line.startswith("python examples/classify.py ")
    _, *rest = shlex.split(line)
    answer = command(sys.executable, *rest)
    assert answer.returncode == 0, answer.stderr
    image = Path(rest[-1])
    best = pipeline("image-classification", model=str(output))(str(image), top_k=1)[0]
    assert answer.stdout.startswith(f"{image}: {best['label']} {best['score']:.1%}, ")


def test_classify_names_what_the_pipeline_names(trained, capsys):
    output, _ = trained
    samples = sorted((output / "samples").iterdir())
    assert [path.name[:2] for path in samples] == [f"{digit}_" for digit in range(10)]
    classify.main(str(output), samples, top_k=2)
    answers = pipeline("image-classification", model=str(output))([str(path) for path in samples], top_k=2)
    expected = [", ".join(f"{answer['label']} {answer['score']:.1%}" for answer in best) for best in answers]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{path}: {answer}" for path, answer in zip(samples, expected, strict=True)]
    right = sum(line.partition(": ")[2].startswith(path.name[0]) for line, path in zip(lines, samples, strict=True))
    assert right >= 5


def test_two_processes_count_every_image_once(tmp_path):
    """Batches of 50 do not divide 360 / 2, so a process sees held-out images that the other has seen.

    Not `--cpu --num_processes 2`: without MPI that starts one process.
    """
    output = tmp_path / "two"
    result = command(
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1,
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0,
        "examples/finetune.py", "--output", output, "--epochs", 3, "--max_steps", 40, "--batch_size", 50,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("test accuracy") == 3 + 1  # the main process alone prints
    assert [line["step"] for line in metrics(output)] == [15, 30, 40]
    assert_accuracy_is_the_pipelines(output, result.stdout)


def test_accelerates_launcher_and_mixed_precision(tmp_path):
    output = tmp_path / "launched"
    result = command(
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1, "--num_machines", 1,
        "--mixed_precision", "bf16", "--dynamo_backend", "no", "examples/finetune.py",
        "--output", output, "--max_steps", 10,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert_accuracy_is_the_pipelines(output, result.stdout)


@pytest.mark.usefixtures("train")
def test_training_uses_the_mixed_precision_and_evaluation_does_not():
    """What is measured is what `pipeline` computes."""
    accelerator = finetune.Accelerator(cpu=True, mixed_precision="bf16")
    config = finetune.FlashKATConfig(**finetune.MICRO, num_labels=2)
    model = accelerator.prepare(finetune.FlashKATForImageClassification(config))
    dtypes = []
    model.classifier.register_forward_hook(lambda _, args, output: dtypes.append(output.dtype))
    batches = [{"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 1])}] * 2
    model(batches[0]["pixel_values"])
    assert dtypes.pop() == torch.bfloat16
    accuracy = finetune.evaluate(model, accelerator.prepare(finetune.DataLoader(batches, None)), accelerator)
    assert accuracy in (0, 1 / 3, 2 / 3, 1)
    assert dtypes == [torch.float32] * 2


def test_a_seed_gives_one_result(train, tmp_path):
    """Weights, order and augmentation; over an earlier result of the script, which is replaced."""
    results = []
    for seed in (1, 1, 2):
        train("--output", tmp_path / "digits", "--max_steps", 4, "--batch_size", 32, "--seed", seed)
        results.append(load_file(tmp_path / "digits" / "model.safetensors"))
    first, again, other = results
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_fine_tuning_starts_from_a_saved_model(train, trained, photos, tmp_path, capsys):
    """Two classes in place of ten: the head is new, the rest is kept."""
    output = tmp_path / "photos-model"
    train(
        "--model", trained[0], "--data", photos, "--output", output, "--learning_rate", 1e-9, "--max_steps", 1,
        "--batch_size", 5, "--drop_path", 0.2, "--workers", 0,
    )  # fmt: skip
    before, after = (load_file(folder / "model.safetensors") for folder in (trained[0], output))
    assert after.pop("classifier.weight").shape == (2, 64)
    assert after.pop("classifier.bias").shape == (2,)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)
    model = AutoModelForImageClassification.from_pretrained(output)
    assert model.config.id2label == {0: "green", 1: "red"}
    assert model.config.drop_path_rate == 0.2
    assert sorted(path.name for path in (output / "samples").iterdir()) == ["green_0.png", "red_3.png"]
    assert "on 6 images" in capsys.readouterr().out


def test_weight_decay_is_for_matrices_and_coefficients():
    model = finetune.FlashKATForImageClassification(finetune.FlashKATConfig(**finetune.MICRO))
    none, decayed = finetune.parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (none["weight_decay"], decayed["weight_decay"]) == (0, 0.1)
    assert len(none["params"]) + len(decayed["params"]) == len(names)
    ends = {names[id(parameter)].split("flashkat.")[-1].rpartition(".")[2] for parameter in decayed["params"]}
    assert ends == {"weight", "numerator", "denominator"}
    assert not any("norm" in names[id(parameter)] for parameter in decayed["params"])


def test_a_truncated_image_ends_the_run_and_keeps_the_earlier_output(train, trained, photos):
    """Its header is whole, so it is found only when it is decoded."""
    output, _ = trained
    before = contents(output)
    bad = photos / "train" / "red" / "3.png"
    bad.write_bytes(bad.read_bytes()[:-200])
    with pytest.raises(SystemExit, match=rf"^--data: cannot read the image {bad}: .*truncated"):
        train("--model", output, "--data", photos, "--output", output, "--workers", 0)
    assert contents(output) == before
    assert [path.name for path in output.parent.iterdir()] == ["digits"]


def test_a_worker_process_names_the_image_too(train, photos, tmp_path):
    bad = photos / "val" / "green" / "1.png"
    bad.write_bytes(bad.read_bytes()[:-200])
    with pytest.raises(SystemExit, match=rf"^--data: cannot read the image {bad}: [^\n]*truncated[^\n]*$"):
        train("--data", photos, "--size", "micro", "--output", tmp_path / "out", "--workers", 1)
    assert not (tmp_path / "out").exists()


def test_a_diverging_run_is_not_saved(train, tmp_path):
    with pytest.raises(SystemExit, match=r"the loss became nan; try a --learning_rate below 1e\+30"):
        train("--learning_rate", 1e30, "--warmup", 0, "--max_steps", 4, "--output", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_swap_puts_the_earlier_output_back(tmp_path, monkeypatch):
    output = tmp_path / "digits"
    output.mkdir()
    (output / "model").write_text("earlier")
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda a, b: 1 / 0 if a.suffix == ".new" else rename(a, b))
    with pytest.raises(ZeroDivisionError), finetune.replacing(output) as folder:
        (folder / "model").write_text("later")
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert (output / "model").read_text() == "earlier"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "--data: nowhere is not a folder"),
        (["--epochs", "0"], "--epochs: 0 must be at least 1"),
        (["--learning_rate", "nan"], "--learning_rate: nan must be"),
        (["--drop_path", "1"], "--drop_path: 1.0 must be at least 0 and below 1"),
        (["--seed", "-1"], "--seed: -1 must be at least 0"),
        (["--output", str(ROOT / "docs")], "docs exists and holds no model saved by this script"),
        (["--output", str(ROOT / "README.md")], "README.md exists and holds no model saved by this script"),
        (["--model", "a", "--size", "tiny"], "--size: tiny is for a fresh model, but --model a has a size of its own"),
        (["--epoch_number", "3"], "unknown arguments: --epoch_number 3"),
    ],
)
def test_settings_are_checked_before_any_work(arguments, message):
    with pytest.raises(SystemExit, match=f"^[^\n]*{re.escape(message)}[^\n]*$"):
        finetune.parse(arguments)


def test_each_data_folder_has_an_output_of_its_own(photos):
    assert finetune.parse([]).output == Path("runs/digits")
    assert finetune.parse(["--data", str(photos)]).output == Path("runs/photos")
    assert finetune.parse(["--data", str(photos), "--output", "a/b"]).output == Path("a/b")


def test_what_others_wrote_is_not_replaced(trained):
    notes = trained[0] / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(SystemExit, match=r"--output: .* also holds what others wrote: notes.txt"):
        finetune.parse(["--output", str(trained[0])])
    notes.unlink()
    assert finetune.parse(["--output", str(trained[0])]).output == trained[0]


def test_finetune_and_classify_fail_in_one_line(tmp_path, photos):
    """No traceback; as commands."""
    (photos / "val" / "red").rename(photos / "val" / "blue")
    for arguments, message in (
        (["finetune.py", "--data", photos, "--output", tmp_path / "out"], f"--data: {photos / 'train'} has classes "),
        (["classify.py", tmp_path / "nowhere", ROOT / "README.md"], f"cannot read the image {ROOT / 'README.md'}: "),
    ):
        result = command(sys.executable, ROOT / "examples" / arguments[0], *arguments[1:], cwd=tmp_path)
        assert result.returncode == 1
        assert message in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def use(train, trained, tmp_path):
    """Start a script with a model's folder."""
    sample = next((trained[0] / "samples").iterdir())

    def use(script: str, folder: Path) -> None:
        if script == "classify":
            classify.main(str(folder), [sample], top_k=1)
        else:
            train("--model", folder, "--output", tmp_path / "out")

    return use


def break_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json|JSON"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
            "it is a vit model, not a FlashKAT",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: os.truncate(folder / "model.safetensors", 20000), "[Ss]afetensors|incomplete|header"),
        (lambda folder: break_weights(folder, lambda _: {"w": torch.zeros(3)}), "holds none of .* tensors"),
        (
            lambda folder: break_weights(folder, lambda t: {k: v for k, v in t.items() if "layers.1.norm1" not in k}),
            "lack|do not fit",
        ),
        (
            lambda folder: break_weights(folder, lambda t: {k: v[:2] if "norm1" in k else v for k, v in t.items()}),
            "mismatch|do not fit",
        ),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "processor"),
    ],
)
@pytest.mark.parametrize("script", ["classify", "finetune"])
def test_broken_checkpoints(use, trained, tmp_path, script, damage, message):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in trained[0].glob("*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    with pytest.raises(SystemExit, match=f"cannot load {folder}: [^\n]*({message})[^\n]*$"):
        use(script, folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["classify", "finetune"])
def test_missing_model_folder(use, tmp_path, script):
    with pytest.raises(SystemExit, match=f"{tmp_path / 'missing'} is not a folder$"):
        use(script, tmp_path / "missing")


def test_classify_checks_the_images_before_the_model(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "load_checkpoint", None)
    good = next((trained[0] / "samples").iterdir())
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:60])
    for image, reason in ((broken, "truncated"), (tmp_path / "none.png", "No such file"), (tmp_path, "directory")):
        with pytest.raises(SystemExit, match=rf"^classify.py: cannot read the image {image}: .*{reason}"):
            classify.main(str(trained[0]), [good, image], top_k=1)
    with pytest.raises(SystemExit, match="--top-k: 0 must be at least 1"):
        classify.main(str(trained[0]), [good], top_k=0)
