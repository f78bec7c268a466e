"""Commands start quickly: what they import is counted, since seconds differ from machine to machine."""

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, micro_config

from flashkat_hf import FlashKATForImageClassification
from flashkat_hf.checkpoints.weights import tensor_shapes
from flashkat_hf.cli import main
from flashkat_hf.lazy import import_uncollected
from flashkat_hf.training.start import start_driver

SLOW = {"torch", "transformers", "timm", "torchvision", "datasets", "sklearn", "accelerate", "matplotlib"}
SLOW |= {"flashkat_hf.training.start"}  # starts the GPU's driver
REFUSED = (  # what a user mistypes, and what the line says
    ("info LOST", "lost is not a folder"),
    ("info RUN", "is the folder of a run, not of a model; try "),
    ("info kat-tiny", "is the name of a published KAT"),
    ("classify LOST x.png", "lost is not a folder"),
    ("classify RUN/best LOST", "cannot read the image"),
    ("plot LOST -o x.png", "lost is not a folder"),
    ("plot RUN/best -o x.gif", "must end with .png, .svg, .html"),
    ("plot RUN/best -o x.png --compare LOST", "lost is not a folder"),
    ("functions LOST", "lost is not a folder"),
    ("functions RUN/best --simplify 0.1", "--simplify needs --images"),
    ("explain LOST x.png -o y.png", "lost is not a folder"),
    ("convert LOST.pth OUT", "is no file, no folder, no Hub id"),
    ("convert --to-original LOST OUT", "lost is not a folder"),
    ("push LOST someone/model", "lost is not a folder"),
    ("push RUN/best someone/model --what-if", "there is no access token"),
    ("push RUN/best model", "owner/name is expected"),
    ("publish kat-tiny --namespace someone", "there is no access token"),
    ("finetune --lr 3", "perhaps --learning_rate"),
    ("finetune --model LOST", "--model: "),
    ("finetune --data LOST", "lost is not a folder"),
    ("finetune --output RUN", "--output: "),
    ("finetune --output FILE", "exists and is not a folder"),
    ("pretrain", "--data is needed"),
    ("evaluate LOST", "lost is not a folder"),
    ("evaluate RUN/best --data LOST", "lost is not a folder"),
)
PROGRAM = """
import json, sys
from flashkat_hf.cli import main
for words in json.loads(sys.argv[1]):
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    print(code, *sorted(sys.modules.keys() & set(json.loads(sys.argv[2]))), file=sys.stderr)
"""


def imported(lines: list[list[str]], modules: set[str], folder: Path) -> list[str]:
    """Run commands in one process; return what is on the standard error, with the modules it has by then."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_TOKEN": ""}
    environment |= {"HF_HOME": str(folder / "home"), "COLUMNS": "100"}
    program = [sys.executable, "-c", PROGRAM, json.dumps(lines), json.dumps(sorted(modules))]
    run = subprocess.run(
        program, env=environment, capture_output=True, text=True, check=True, cwd=folder, timeout=300
    )
    return run.stderr.splitlines()


def test_refusals(bare_folder, tmp_path):
    """Each is one line, and none imports PyTorch; nor do --version and the help of every command."""
    folder, best = tmp_path / "work", tmp_path / "work/run/best"
    best.parent.mkdir(parents=True)
    bare_folder.rename(best)
    (folder / "file").write_text("")
    names = {"LOST": folder / "lost", "RUN": best.parent, "FILE": folder / "file", "OUT": folder / "out"}

    def words(text: str) -> list[str]:
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text.split()

    refused = imported([words(text) for text, _ in REFUSED], SLOW, folder)
    assert refused[1::2] == ["1"] * len(REFUSED)
    for (text, message), line in zip(REFUSED, refused[::2], strict=True):
        assert line.startswith(f"flashkat {text.split()[0]}: "), line
        assert message in line, text
    commands = "finetune pretrain evaluate classify convert info push publish plot functions explain"
    helped = [[name, "--help"] for name in commands.split()]
    assert imported([["--version"], ["--help"], *helped], SLOW, folder) == ["0"] * (2 + len(helped))


def test_info(bare_folder, tmp_path):
    """It takes neither the model nor the image processor, whose imports take seconds."""
    slow = {"transformers.modeling_utils", "torch._inductor", "torch._dynamo", "torchvision", "timm"}
    assert imported([["info", str(bare_folder)]], slow, tmp_path) == ["0"]


@pytest.fixture
def searches():
    """Return a function that counts the collector's runs; objects that a test freezes are thawed after it."""
    assert gc.isenabled()
    yield lambda: sum(generation["collections"] for generation in gc.get_stats())
    gc.unfreeze()


def test_imports_are_not_searched_for_garbage(searches, tmp_path, monkeypatch):
    (tmp_path / "many.py").write_text("found = [[number] for number in range(100_000)]")
    (tmp_path / "broken.py").write_text("found = [[number] for number in range(100_000)]\nimport lost_module")
    monkeypatch.syspath_prepend(tmp_path)
    gc.unfreeze()
    before = searches()
    found = import_uncollected("many", "").found
    assert searches() == before
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(found)
    gc.unfreeze()
    assert import_uncollected("many", "").found is found
    assert gc.get_freeze_count() == 0  # only what an import brought is left out
    with pytest.raises(ModuleNotFoundError, match="lost_module"):
        import_uncollected("broken", "")
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("broken", "called"),
    [
        ("", ["cuInit", "cuDeviceGetCount", "cuDeviceGet 1", "cuDevicePrimaryCtxRetain 7"]),
        ("cuInit", ["cuInit"]),
        ("cuDeviceGetCount", ["cuInit", "cuDeviceGetCount"]),
        ("cuDeviceGet", ["cuInit", "cuDeviceGetCount", "cuDeviceGet 1"]),
    ],
)
def test_the_driver_makes_the_context_of_one_gpu(broken, called, monkeypatch):
    """Process 5 of a machine with 2 GPUs has the second of them; a driver that fails is left alone."""
    calls = []

    def note(name: str, number: object = "") -> int:
        calls.append(f"{name} {number}".strip())
        return int(name == broken)

    def get_count(count) -> int:
        count._obj.value = 2
        return note("cuDeviceGetCount")

    def get_device(device, index: int) -> int:
        device._obj.value = 7
        return note("cuDeviceGet", index)

    driver = SimpleNamespace(
        cuInit=lambda flags: note("cuInit"),
        cuDeviceGetCount=get_count,
        cuDeviceGet=get_device,
        cuDevicePrimaryCtxRetain=lambda _, device: note("cuDevicePrimaryCtxRetain", device.value),
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    start_driver(5)
    assert calls == called


@pytest.mark.parametrize(
    "line",
    [
        "info ~/lost", "evaluate ~/lost", "evaluate MODEL --data=~/lost", "plot MODEL -o ~/lost/x.png",
        "plot MODEL -o x.png --compare=~/lost", "classify MODEL ~/lost", "push ~/lost someone/model",
        "convert ~/lost x", "finetune --data=~/lost", "finetune --model=~/lost",
    ],
)  # fmt: skip
def test_a_home_is_expanded_where_the_shell_does_not(bare_folder, monkeypatch, capsys, line):
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.chdir(bare_folder)
    assert main(line.replace("MODEL", str(bare_folder)).split()) == 1
    assert "/somewhere/lost" in capsys.readouterr().err


FUNCTIONS = ["rational"] * 3 + ["identity", "gelu", "leaky_relu", "rational", "relu"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qkv_bias": False, "num_numerator_groups": 8, "num_labels": 0, "num_channels": 1, "pooling": "mean"},
        {
            "simplified_functions": {"0.act1": FUNCTIONS, "1.act2": ["identity"] * 8},
            "num_numerator_groups": 8,
        },
        {"simplified_functions": {"1.act1": FUNCTIONS}},
        {"image_size": [32, 64], "patch_size": [8, 16], "num_register_tokens": 2},
    ],
    ids=["plain", "other fields", "simplified", "simplified, one numerator", "pairs and registers"],
)
def test_shapes_are_the_models(fields):
    config = micro_config(**fields)
    with torch.device("meta"):
        model = FlashKATForImageClassification(config)
    state = model.state_dict()
    assert tensor_shapes(config) == {name: tuple(tensor.shape) for name, tensor in state.items()}
