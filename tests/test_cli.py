"""The command: what it prints, its exit codes, and one line on the standard error for every error."""

import os
import subprocess
import sys
import tomllib

import pytest
import torch
from helpers import ROOT, original_state
from safetensors.torch import load_file

from flashkat_hf import __version__
from flashkat_hf.cli import TRANSFORMS, main, parse_settings
from flashkat_hf.conversion import source


@pytest.fixture
def kat(tmp_path):
    torch.save(original_state("kat"), tmp_path / "kat.pth")
    return str(tmp_path / "kat.pth")


def test_convert_info_and_back(kat, tmp_path, capsys):
    out, back = str(tmp_path / "out"), str(tmp_path / "back.safetensors")
    assert main(["convert", kat, out, "--set", "num_attention_heads=2", "--set", "drop_path_rate=0.1"]) == 0
    text = capsys.readouterr().out
    assert "KAT, 114,402 parameters, 2 layers of 64 channels, 2 heads" in text
    assert "verified against the source in float64: largest difference of the logits" in text
    assert "top-1 agreement 100%" in text
    assert text.endswith(f"{out} written\n")
    assert main(["info", out]) == 0
    assert "activations learned" in capsys.readouterr().out
    assert main(["convert", "--to-original", out, back]) == 0
    assert capsys.readouterr().out.startswith(f"{back}: kat naming, img_size=32")
    assert all(torch.equal(tensor, original_state("kat")[name]) for name, tensor in load_file(back).items())


def test_every_option_reaches_the_function(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(
        "flashkat_hf.conversion.conversion.convert",
        lambda *args, **kwargs: seen.update(args=args, **kwargs) or "report",
    )
    options = "--overwrite --image-size 48 --num-labels 7 --set a=1 --transform augreg --no-ema --revision v1"
    assert main(["convert", "kat-tiny", "y", *options.split(), "--no-verify", "--calibrate", "images"]) == 0
    assert seen == {
        "args": ("kat-tiny", "y"),
        "overwrite": True,
        "image_size": 48,
        "num_labels": 7,
        "settings": {"a": 1},
        "transform": "augreg",
        "ema": False,
        "revision": "v1",
        "verify": False,
        "calibrate": "images",
    }


def test_settings():
    assignments = ["num_attention_heads=3", "drop_path_rate=0.1", "qkv_bias=true", "pooling=mean", "x=a=b"]
    assert parse_settings(assignments) == {
        "num_attention_heads": 3,
        "drop_path_rate": 0.1,
        "qkv_bias": True,
        "pooling": "mean",
        "x": "a=b",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("convert lost OUT", "lost is no file, no folder, no Hub id"),
        ("convert KAT OUT --set heads", "--set heads: FIELD=VALUE is expected"),
        (
            "convert KAT OUT --set num_attention_heads=2 --set num_attention_heads=4",
            "num_attention_heads is set twice",
        ),
        ("convert KAT OUT --set num_attention_heads=5", "must be a multiple of num_attention_heads"),
        ("convert KAT OUT --set num_attention_heads=two", "num_attention_heads"),
        ("convert KAT OUT --image-size 33", "must be a multiple of patch_size"),
        ("convert KAT KAT", "kat.pth exists"),
        ("convert KAT OUT --naming kat", "--naming has no meaning without --to-original"),
        (
            "convert KAT OUT.pth --to-original --num-labels 3",
            "--num-labels has no meaning with --to-original",
        ),
        ("convert KAT OUT.pth --to-original", "is not a folder"),
        ("info KAT", "is not a folder"),
    ],
)
def test_errors_are_one_line(kat, tmp_path, capsys, arguments, message):
    words = [word.replace("KAT", kat).replace("OUT", str(tmp_path / "out")) for word in arguments.split()]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"flashkat {words[0]}: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["kat.pth"]


def test_command_as_a_user_runs_it(tmp_path):
    """A process of its own: exit codes, one line, no traceback, no network; and the entry point exists."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"flashkat": "flashkat_hf.cli:main"}
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "flashkat_hf", "convert", "kat-tiny", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot get kat_tiny_patch16_224_1f3ad3b2" in done.stderr
    assert "give the path of the file or folder instead" in done.stderr
    assert done.stderr.count("\n") == 1
    assert subprocess.run(command[:3], env=environment, capture_output=True, check=False).returncode == 2


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SHOW_MODULES = """
import sys
from flashkat_hf.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print(code, *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
SLOW = {"torch", "torchvision", "transformers", "timm", "numpy", "huggingface_hub", "accelerate"}  # to import


def imported(*arguments) -> tuple[str, set[str]]:
    """Return the exit code of a command, and the packages that it has imported."""
    command = [sys.executable, "-c", SHOW_MODULES, *map(str, arguments)]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    code, *names = run.stderr.splitlines()[-1].split()
    return code, set(names)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("--version", "0"),
        ("--help", "0"),
        ("info --help", "0"),
        ("finetune --help", "0"),
        ("evaluate --help", "0"),
        ("explode", "2"),
        ("push", "2"),
        ("convert a b --naming kat", "1"),
        ("info nowhere/ README.md", "2"),
        ("info README.md", "1"),
        ("finetune --lr 3", "1"),
        ("finetune --epochs 0", "1"),
        ("finetune --model README.md", "1"),
        ("pretrain", "1"),
        ("evaluate model --split all", "2"),
        ("classify model image.png --top-k 0", "1"),
    ],
)
def test_what_needs_no_model_imports_none(arguments, code):
    got, names = imported(*(str(ROOT / word) if word == "README.md" else word for word in arguments.split()))
    assert got == code
    assert not names & SLOW


def test_info_imports_what_a_model_needs(model_folder):
    code, names = imported("info", model_folder)
    assert code == "0"
    assert "torch" in names
    assert not names & {"timm", "datasets", "sklearn", "matplotlib", "webdataset", "onnx", "pandas"}


def test_version_and_transforms(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"flashkat_hf {__version__}\n")
    assert tuple(source.TRANSFORMS) == TRANSFORMS


@pytest.mark.parametrize("arguments", ["--help", "finetune --help", "info FOLDER"])
def test_a_closed_pipe_is_no_error(model_folder, arguments):
    """As after `| head`: nobody reads, and nothing is said about it."""
    words = [word.replace("FOLDER", str(model_folder)) for word in arguments.split()]
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "flashkat_hf", *words]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    run = subprocess.run(
        command, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert run.stderr == ""
    assert run.returncode == 141 or (run.returncode == 0 and "--help" in words)  # argparse passes over it


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("torch", "info FOLDER"), ("yaml", "finetune"), ("transformers", "convert kat-tiny OUT")],
)
def test_ctrl_c_while_importing(model_folder, tmp_path, package, arguments):
    """The package that stands in sends the signal when it is imported.

    It sets Python's own handler first, since a shell has the programs that it starts with & ignore Ctrl-C.
    """
    (tmp_path / "first").mkdir()
    text = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    text += "signal.raise_signal(signal.SIGINT)\ntime.sleep(9)\n"
    (tmp_path / "first" / f"{package}.py").write_text(text)
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path / 'first'}{os.pathsep}{ROOT}"}
    words = [word.replace("FOLDER", str(model_folder)) for word in arguments.split()]
    command = [sys.executable, "-m", "flashkat_hf", *words]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 130
    assert run.stderr.startswith(f"flashkat {words[0]}: interrupted")
    assert run.stderr.count("\n") == 1
