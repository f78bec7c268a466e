"""The built wheel in an environment of its own, with no clone beside it: every command does its work."""

import json
import os
import shlex
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from helpers import ROOT

from flashkat_hf import __version__

PARTS = ("flashkat_hf", "model_cards", "pyproject.toml", "README.md", "LICENSE")  # what a wheel is built from


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """Return the folder of programs of an environment that has the wheel; its dependencies are this one's."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    shutil.rmtree(folder / "source")
    venv.create(folder / "bare", with_pip=False, symlinks=True)
    programs = folder / "bare" / "bin"
    (wheel,) = folder.glob("*.whl")
    run(*pip, "--python", programs / "python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = (folder / "bare" / "lib").glob("*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return programs


def run(*command, cwd: Path | None = None, code: int = 0) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    return result


def test_the_demo_and_every_command(bare, tmp_path):
    flashkat, short = bare / "flashkat", ["--max_steps", 10, "--epochs", 1]
    where = run(bare / "python", "-c", "import flashkat_hf; print(flashkat_hf.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(bare.parent)
    assert run(flashkat, "--version").stdout == f"flashkat_hf {__version__}\n"

    trained = run(flashkat, "finetune", *short, cwd=tmp_path)
    assert "saved in runs/digits/best" in trained.stdout
    program, *words = shlex.split(trained.stdout.splitlines()[-1])
    image = words[-1]
    assert run(bare / program, *words, cwd=tmp_path).stdout.startswith(f"{image}: ")

    best = tmp_path / "runs/digits/best"
    result = json.loads(run(flashkat, "evaluate", best, "--json").stdout)
    assert result["top1"] == json.loads((best / "summary.json").read_text())["top1"]
    assert "FlashKATForImageClassification" in run(flashkat, "info", best).stdout
    assert "flashkat pretrain: --data is needed" in run(flashkat, "pretrain", code=1).stderr


def test_accelerates_launcher(bare, tmp_path):
    """As on several devices; the wheel brings all recipes."""
    launch = [bare / "python", "-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "flashkat_hf"]
    run(*launch, "finetune", "--max_steps", 2, "--epochs", 1, "--output", "run", cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    names = {path.stem for path in (ROOT / "flashkat_hf/training/recipes").glob("*.yaml")}
    assert {"finetune", "finetune-digits", "pretrain-tiny", "pretrain-small", "pretrain-base"} <= names
    for name in names:
        refused = run(bare / "flashkat", "finetune", "--recipe", name, "--epochs", "0", code=1)
        assert refused.stderr == "flashkat finetune: --epochs: 0 must be at least 1\n"
