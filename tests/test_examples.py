"""The example scripts as a user runs them, with small budgets."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import pipeline

from flashkat_hf.data import load_digits

ROOT = Path(__file__).parent.parent
FINETUNE, CLASSIFY = (str(ROOT / "examples" / f"{name}.py") for name in ("finetune", "classify"))
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")


def run(*command) -> subprocess.CompletedProcess:
    command = [str(part) for part in command]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def accuracy(result: subprocess.CompletedProcess) -> float:
    assert result.returncode == 0, result.stderr
    return float(re.search(r"^test accuracy ([\d.]+)% on 360 images", result.stdout, re.MULTILINE)[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that saw the digits for four epochs, and what the script printed."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    return output, run(sys.executable, FINETUNE, "--output", output, "--epochs", 6)


def test_it_learns(trained):
    assert accuracy(trained[1]) > 40  # chance is 10; forty epochs reach 98


def test_the_saved_folder_gives_the_printed_accuracy(trained):
    output, result = trained
    test = load_digits().test
    answers = pipeline("image-classification", model=str(output))(list(test.images), top_k=1)
    correct = sum(answer[0]["label"] == str(label) for answer, label in zip(answers, test.labels, strict=True))
    assert f"{correct / 360:.2%}" in result.stdout
    history = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history] == [23, 46, 69, 92, 115, 138]
    assert history[-1]["test_accuracy"] == correct / 360


def test_classify_names_what_the_pipeline_names(trained):
    output, _ = trained
    samples = sorted((output / "samples").iterdir())
    result = run(sys.executable, CLASSIFY, output, *samples, "--top_k", 2)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    answers = pipeline("image-classification", model=str(output))([Image.open(path) for path in samples], top_k=1)
    assert len(lines) == len(samples) == 10
    for line, path, answer in zip(lines, samples, answers, strict=True):
        assert line.startswith(f"{path}: {answer[0]['label']} ")


def test_fine_tuning_a_saved_model_starts_from_it(trained, tmp_path):
    result = run(
        sys.executable, FINETUNE, "--model", trained[0], "--output", tmp_path / "more", "--max_steps", 1,
        "--learning_rate", 1e-6,
    )  # fmt: skip
    assert abs(accuracy(result) - accuracy(trained[1])) < 3  # one tiny step


def test_two_processes_count_every_image_once(tmp_path):
    result = run(
        *ACCELERATE, "--cpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", 0, FINETUNE, "--output", tmp_path / "two", "--max_steps", 3,
        "--batch_size", 50,
    )  # fmt: skip
    assert accuracy(result) >= 0
    assert result.stdout.count("test accuracy") == 1


def test_a_failing_run_keeps_what_was_saved(trained, tmp_path):
    output, _ = trained
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    result = run(sys.executable, FINETUNE, "--output", output, "--data", tmp_path)
    assert result.returncode != 0
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere/train is not a folder"),
        (["--size", "huge"], "'huge' is none of micro, tiny, small, base"),
        (["--epochs", 0], "--epochs: 0 must be positive"),
        (["--output", ROOT / "docs"], "docs exists and was not written by this script"),
        (["--model", "/nowhere/model"], "/nowhere/model"),
    ],
)
def test_finetune_refuses_in_one_line(arguments, message):
    result = run(sys.executable, FINETUNE, *arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_classify_refuses_in_one_line(trained, tmp_path):
    output, _ = trained
    sample = next((output / "samples").iterdir())
    broken = tmp_path / "broken.png"
    broken.write_bytes(sample.read_bytes()[:50])
    for model, image, message in (
        (output, broken, str(broken)),
        (output, "missing.png", "missing.png"),
        (tmp_path, sample, str(tmp_path)),
    ):
        result = run(sys.executable, CLASSIFY, model, image)
        assert result.returncode == 1
        assert message in result.stderr
        assert "Traceback" not in result.stderr
