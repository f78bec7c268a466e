"""A checkpoint that brings its code: what is written, and what it is worth where the package is not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from helpers import ROOT, micro_config
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification
from transformers.dynamic_module_utils import get_imports

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification, FlashKATModel, make_image_processor
from flashkat_hf.checkpoints.remote_code import CODE_FILES, check_code, write_code
from flashkat_hf.model.configuration_flashkat import AUTO_MAP

REVISION = "0123456789abcdef0123456789abcdef01234567"
LABELS = {i: f"digit {i}" for i in range(10)}


def random_model(seed: int) -> FlashKATForImageClassification:
    torch.manual_seed(seed)
    model = FlashKATForImageClassification(
        micro_config(id2label=LABELS, label2id={v: k for k, v in LABELS.items()})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint in `model`, what it computes in `batch`, and a Hub cache that has it too."""
    place = tmp_path_factory.mktemp("remote")
    snapshot = place / f"home/hub/models--someone--flashkat.micro-1/snapshots/{REVISION}"
    pixel_values = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = {"pixel_values": pixel_values}
    for folder, name, seed in ((place / "model", "logits", 1), (snapshot / "step-2", "other", 2)):
        model = random_model(seed)
        model.save_pretrained(folder)
        batch[name] = model(pixel_values).logits.detach()
    make_image_processor(image_size=32).save_pretrained(place / "model")
    save_file(batch, place / "batch.safetensors")
    for name in CODE_FILES:  # the Hub's custom code is at the root only
        (snapshot / "step-2" / name).unlink()
    shutil.copytree(place / "model", snapshot, dirs_exist_ok=True)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(REVISION)
    return place


def run_isolated(place: Path, function: str, hidden: list[str], **arguments) -> None:
    """Call a function of isolated.py where the package cannot be imported, nor `hidden`; offline."""
    packages = dict.fromkeys(str(Path(module.__file__).parent.parent) for module in (transformers, torch))
    test = {
        "path": list(packages),
        "hidden": hidden,
        "batch": str(place / "batch.safetensors"),
        "arguments": arguments,
    }
    kept = {
        name: os.environ[name]
        for name in ("PATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
        if name in os.environ
    }
    environment = kept | {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "HOME": str(place)}
    result = subprocess.run(
        [sys.executable, "-I", "-S", ROOT / "tests/support/isolated.py", function, json.dumps(test)],
        env=environment,
        stdin=subprocess.DEVNULL,  # transformers asks
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.endswith("done\n"), result.stdout + result.stderr


def test_without_package_and_triton(place):
    hidden = ["flashkat_hf", "triton", "timm", "sklearn", "scipy", "matplotlib", "peft", "kernels"]
    run_isolated(
        place,
        "without_triton",
        hidden,
        folder=str(place / "model"),
        hub="someone/flashkat.micro-1",
        out=str(place / "again"),
    )
    for saved in ("second", "third", "fourth", "base", "config"):
        assert check_code(place / "again" / saved) == []
    assert (
        type(AutoModelForImageClassification.from_pretrained(place / "again/third"))
        is FlashKATForImageClassification
    )


@pytest.mark.parametrize(
    "function", ["with_triton_and_the_package", pytest.param("on_a_gpu", marks=pytest.mark.gpu)]
)
def test_beside_other_code_and_the_package(function, place):
    shutil.copytree(place / "model", place / "copy", dirs_exist_ok=True)
    folders = {"folder": str(place / "model"), "copy": str(place / "copy")}
    run_isolated(place, function, [], **folders, package=str(ROOT))


@pytest.mark.parametrize(
    "make", [micro_config, lambda: FlashKATModel(micro_config())], ids=["config", "model"]
)
def test_every_save_is_whole(make, tmp_path):
    make().save_pretrained(tmp_path)
    assert check_code(tmp_path) == []
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert FlashKATConfig.from_pretrained(tmp_path).auto_map == AUTO_MAP


def test_trainer_saves_the_code(tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    transformers.Trainer(FlashKATModel(micro_config()), arguments).save_model()
    assert check_code(tmp_path) == []


@pytest.mark.parametrize(
    "make", [micro_config, lambda: FlashKATModel(micro_config())], ids=["config", "model"]
)
def test_push_sends_the_code(make, tmp_path, monkeypatch):
    """Sent is what changed while transformers saved: files written before or after would be left out."""
    sent = []
    repository = huggingface_hub.RepoUrl("https://huggingface.co/someone/new")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: repository)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "create_commit",
        lambda *_, operations, **__: sent.extend(operation.path_in_repo for operation in operations),
    )
    monkeypatch.setattr(
        huggingface_hub.ModelCard, "load", lambda *_, **__: huggingface_hub.ModelCard("---\n---\n")
    )
    make().save_pretrained(str(tmp_path), push_to_hub=True, repo_id="someone/new")
    assert {"config.json", *CODE_FILES} <= set(sent)


def test_code_is_completed(tmp_path):
    """A folder whose code is missing, old or someone else's; what the map has beside is kept."""
    FlashKATModel(micro_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoModel": "someone/other--modeling.Model",
        "AutoImageProcessor": "processing.Processor",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "operators.py").unlink()
    (tmp_path / "layers.py").write_text("old\n")
    problems = check_code(tmp_path)
    assert len(problems) == 7
    for words in (
        "operators.py is missing",
        "layers.py differs",
        "None for AutoConfig",
        "None for AutoBackbone",
        "'someone/other--modeling.Model'",
    ):
        assert any(words in problem for problem in problems), problems
    write_code(tmp_path)
    assert check_code(tmp_path) == []
    completed = json.loads((tmp_path / "config.json").read_text())
    assert completed == config | {"auto_map": AUTO_MAP | {"AutoImageProcessor": "processing.Processor"}}
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    write_code(tmp_path)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), ("{", "is not JSON"), ('{"model_type": "vit"}', "not the config of a FlashKAT")],
)
def test_folders_without_a_flashkat(content, message, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(content)
    for function in (write_code, check_code):
        with pytest.raises(ValueError, match=message):
            function(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == (["config.json"] if content else [])


def test_requirements_of_the_code():
    """Refused is code whose imports outside `try` are not installed, file by file."""
    required = {name for file in CODE_FILES for name in get_imports(ROOT / "flashkat_hf/model" / file)}
    assert required - sys.stdlib_module_names == {"huggingface_hub", "torch", "transformers"}
