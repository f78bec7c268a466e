"""The check of a folder before a push: one line for each thing that must not, or cannot, be sent."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashkat_hf.hub.staging import check_weights, stage


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_state(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def without_folder(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


SPOILED = {
    "is not a folder": without_folder,
    "is not a model folder, as it has no config.json": lambda folder: (folder / "config.json").unlink(),
    "config.json is no JSON file": lambda folder: (folder / "config.json").write_text("{"),
    "config.json is no JSON object": lambda folder: (folder / "config.json").write_text("[]"),
    "config.json describes a vit model, not a FlashKAT": lambda folder: change_config(
        folder, model_type="vit"
    ),
    "hidden_size must be a multiple of num_attention_heads": lambda folder: change_config(
        folder, num_attention_heads=5
    ),
    "neither model.safetensors nor model.safetensors.index.json": lambda folder: (
        folder / "model.safetensors"
    ).unlink(),
    "model.safetensors is damaged": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-9]
    ),
    "the weights lack 1 tensors of the model in config.json, such as classifier.bias": lambda folder: (
        change_state(folder, lambda state: state.pop("classifier.bias"))
    ),
    "the weights have 1 tensors that config.json does not call for: more": lambda folder: change_state(
        folder, lambda state: state.update(more=torch.zeros(1))
    ),
    "norm.bias has 1 values of 64 that are NaN or infinite": lambda folder: change_state(
        folder, lambda state: state["flashkat.norm.bias"].index_fill_(0, torch.tensor(3), float("nan"))
    ),
    "norm.bias is int64 in the weights": lambda folder: change_state(
        folder, lambda state: state.update({"flashkat.norm.bias": torch.ones(64, dtype=torch.int64)})
    ),
    "the weights have 2 layers, but config.json 1000000": lambda folder: change_config(
        folder, num_hidden_layers=1_000_000
    ),
    "config.json has 5 as the label of output 0, which is no name": lambda folder: change_config(
        folder, id2label={str(i): 5 for i in range(10)}
    ),
    "its processor has image_mean [0.5, 0.5], but the model takes 3 channels": lambda folder: (
        folder / "preprocessor_config.json"
    ).write_text('{"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.5]}'),
    "in the weights, but (512, 64) by config.json": lambda folder: change_config(
        folder, intermediate_size=512
    ),
    "makes images of 32 pixels, but the model takes 64": lambda folder: (
        change_config(folder, image_size=64),
        change_state(folder, lambda state: state.update(longer(state))),
    ),
    "pytorch_model.bin is not a safetensors file": lambda folder: (folder / "pytorch_model.bin").write_bytes(
        b"x"
    ),
    "ema.pth is not a safetensors file": lambda folder: (folder / "ema.pth").write_bytes(b"x"),
    "notes.md, line 2, names a path of this machine": lambda folder: (folder / "notes.md").write_text(
        "As in\n" + "/" + "home/alice/runs.\n"
    ),
    "labels.txt holds an access token": lambda folder: (folder / "labels.txt").write_text("hf_" + "x" * 34),
    "log.txt holds an access token": lambda folder: (folder / "log.txt").write_text("token: secret-of-alice"),
    "summary.json is no JSON file": lambda folder: (folder / "summary.json").write_text("{'a': 1}"),
    "README.md: ": lambda folder: (folder / "README.md").write_text("---\ntags: [a\n---\n# Model\n"),
}


def longer(state):
    name = "flashkat.embeddings.position_embeddings"
    return {name: torch.zeros(1, 65, state[name].shape[-1])}


@pytest.mark.parametrize("sentence", SPOILED)
def test_a_folder_that_cannot_be_pushed(model_folder, tmp_path, sentence):
    SPOILED[sentence](model_folder)
    (tmp_path / "staged").mkdir()
    with pytest.raises(ValueError, match=r"cannot be pushed") as caught:
        stage(model_folder, tmp_path / "staged", token="secret-of-alice")
    assert str(caught.value).startswith(f"{model_folder} cannot be pushed: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "staged" not in str(caught.value)


@pytest.mark.parametrize("shard", ["../evil.safetensors", "lost.safetensors", 7])
def test_an_index_that_names_other_files(model_folder, shard):
    (model_folder / "model.safetensors").rename(model_folder / "model-00001-of-00001.safetensors")
    (model_folder.parent / "evil.safetensors").write_bytes(b"")
    index = {"weight_map": {"classifier.bias": shard}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"names {shard}, which is not there"):
        check_weights(model_folder)


def test_only_the_weights_that_are_loaded(model_folder, tmp_path):
    """Shards beside a single file, and other safetensors files, stay behind."""
    for name in ("model-00001-of-00002.safetensors", "adapter_model.safetensors", "optimizer.safetensors"):
        (model_folder / name).write_bytes(b"x")
    (model_folder / "train.py").write_text("")
    (model_folder / ".cache").mkdir()
    (tmp_path / "staged").mkdir()
    staged = stage(model_folder, tmp_path / "staged")
    assert staged.left_out == {
        ".cache": "hidden",
        "adapter_model.safetensors": "not a part of the weights",
        "model-00001-of-00002.safetensors": "not a part of the weights",
        "optimizer.safetensors": "training state",
        "train.py": "not this package's code",
    }
    assert [path.name for path in staged.folder.glob("*.safetensors")] == ["model.safetensors"]


def test_a_checkpoint_during_training_is_checked_too(model_folder, tmp_path):
    change_state(model_folder, lambda state: state["flashkat.norm.bias"].fill_(float("inf")))
    (tmp_path / "staged").mkdir()
    with pytest.raises(ValueError, match=r"norm\.bias has 64 values of 64 that are NaN"):
        stage(model_folder, tmp_path / "staged", final=False)


def test_changed_code_is_replaced(model_folder, tmp_path):
    (model_folder / "operators.py").write_text("import os\n")
    (tmp_path / "staged").mkdir()
    staged = stage(model_folder, tmp_path / "staged")
    assert (staged.folder / "operators.py").read_text() != "import os\n"
    assert (model_folder / "operators.py").read_text() == "import os\n"
