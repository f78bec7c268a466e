"""Clients that others use run for real: Transformers, its Trainer, `hf`, and the command in a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, micro_config
from huggingface_hub import HfApi, constants
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from flashkat_hf import FlashKATForImageClassification

Auto = AutoModelForImageClassification


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    state, expected = first.state_dict(), second.state_dict()
    return list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)


@pytest.fixture
def model():
    return FlashKATForImageClassification(micro_config()).eval()


def test_push_to_hub_and_from_pretrained(hub, model, tmp_path, monkeypatch):
    """Models load when private, by branch, tag and commit, from shards, another cache, offline."""
    model.push_to_hub("alice/micro", private=True)
    first = hub.head("alice/micro")
    assert hub.repositories["models", "alice/micro"].private
    assert same(Auto.from_pretrained("alice/micro"), model)

    second = FlashKATForImageClassification(micro_config())
    second.push_to_hub("alice/micro", revision="dev/2", max_shard_size="100KB", create_pr=False)
    HfApi().create_tag("alice/micro", tag="v1", revision="main")
    assert "model.safetensors.index.json" in hub.files("alice/micro", "dev/2")
    second.push_to_hub("alice/micro", create_pr=True, max_shard_size="100KB")
    for revision, expected in (("dev/2", second), ("refs/pr/1", second), ("v1", model), (first, model)):
        if revision == "dev/2":  # the branch was made from main, whose single file transformers prefers
            hub.repositories["models", "alice/micro"].find(revision).files.pop("model.safetensors")
        if revision == "refs/pr/1":
            hub.repositories["models", "alice/micro"].find(revision).files.pop("model.safetensors")
        assert same(Auto.from_pretrained("alice/micro", revision=revision), expected), revision

    model.save_pretrained(tmp_path / "saved")
    HfApi().upload_folder(repo_id="alice/micro", folder_path=tmp_path / "saved", path_in_repo="runs/one")
    cache = tmp_path / "cache"
    loaded = Auto.from_pretrained("alice/micro", subfolder="runs/one", cache_dir=cache, token="hf_alice")
    assert same(loaded, model)
    assert (cache / "models--alice--micro").is_dir()

    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with pytest.raises(OSError, match="is not a local folder and is not a valid model identifier"):
        Auto.from_pretrained("alice/micro", cache_dir=tmp_path / "empty")
    hub.requests.clear()
    assert same(Auto.from_pretrained("alice/micro", local_files_only=True, revision=first), model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(Auto.from_pretrained("alice/micro", revision=first), model)
    assert hub.requests == []


class Images(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"pixel_values": torch.full((3, 32, 32), index / 8), "labels": index % 2}


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_trainer(hub, model, tmp_path):
    """Trainer(push_to_hub=True) pushes every checkpoint and the end in commits of their own."""
    settings = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        push_to_hub=True,
        hub_model_id="alice/run",
        hub_strategy="every_save",
        hub_always_push=True,
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, settings, train_dataset=Images())
    trainer.train()
    trainer.push_to_hub()
    titles = hub.titles("alice/run")
    assert titles[0] == "End of training"
    assert "Training in progress, step 2" in titles
    assert same(Auto.from_pretrained("alice/run"), model)


def test_hf_and_flashkat_in_processes_of_their_own(hub, model_folder, tmp_path):
    """A stranger pushes with the command, then downloads and uploads with `hf`, all by the environment."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "PYTHONPATH": str(ROOT),
    }

    def run(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    flashkat = (sys.executable, "-m", "flashkat_hf.cli")
    result = run(*flashkat, "push", str(model_folder), "alice/micro", "--private")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == f"{hub.url}/alice/micro/commit/{hub.head('alice/micro')}"
    hf = str(Path(sys.executable).with_name("hf"))
    result = run(hf, "download", "alice/micro", "--local-dir", str(tmp_path / "copy"))
    assert result.returncode == 0, result.stderr
    for path in model_folder.iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
    result = run(hf, "upload", "alice/by-hf", str(model_folder))
    assert result.returncode == 0, result.stderr
    assert same(Auto.from_pretrained("alice/by-hf"), Auto.from_pretrained(model_folder))
