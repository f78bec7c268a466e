"""Commands start quickly: what they import is counted, since seconds differ from machine to machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, micro_config

from flashkat_hf import FlashKATForImageClassification
from flashkat_hf.checkpoints.weights import tensor_shapes
from flashkat_hf.cli import main

SLOW = {"torch", "transformers", "timm", "torchvision", "datasets", "sklearn", "accelerate", "matplotlib"}
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
