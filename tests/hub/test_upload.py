"""Pushing: what is sent, what is left alone, and what `flashkat push` says about it."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT, micro_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from flashkat_hf import FlashKATForImageClassification
from flashkat_hf.cli import main
from flashkat_hf.hub import push

FIRST = ["Upload FlashKAT", "initial commit"]


def writes(hub) -> list[str]:
    """Return the requests that may change something, less those that only ask or check a card."""
    return [line for line in hub.requests if not line.startswith(("GET", "HEAD"))]


def change_weights(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def test_push_and_load(hub, model_folder, capsys, monkeypatch):
    """One commit is made and loads bit for bit; the same push again makes none, a change sends one file."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["push", str(model_folder), "alice/micro"]) == 0
    output = capsys.readouterr()
    assert "alice/micro, a new repository; branch main\n" in output.out
    assert "model.safetensors" in output.out
    assert output.out.splitlines()[-1] == f"{hub.url}/alice/micro/commit/{hub.head('alice/micro')}"
    assert "model.safetensors: 100%" in output.err  # the progress bar
    assert hub.titles("alice/micro") == FIRST
    sent = hub.files("alice/micro")
    for path in model_folder.iterdir():
        assert sent[path.name] == path.read_bytes()
    loaded = AutoModelForImageClassification.from_pretrained("alice/micro")
    state = load_file(model_folder / "model.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())

    hub.requests.clear()
    assert main(["push", str(model_folder), "alice/micro"]) == 0
    assert "alice/micro has all of it already" in capsys.readouterr().out
    assert writes(hub) == []
    assert hub.titles("alice/micro") == FIRST

    change_weights(model_folder)
    result = push(model_folder, "alice/micro", message="Epoch 2")
    assert list(result.changed) == ["model.safetensors"]
    assert hub.titles("alice/micro") == ["Epoch 2", *FIRST]
    assert hub.files("alice/micro")["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()


def test_the_folder_stays_as_it_is(hub, tmp_path, bare_folder):
    """Card and code are written into a copy."""
    before = {path.name: path.read_bytes() for path in bare_folder.iterdir()}
    assert "README.md" not in before
    push(bare_folder, "alice/micro")
    assert push(bare_folder, "alice/micro").empty  # they come out the same
    assert {path.name: path.read_bytes() for path in bare_folder.iterdir()} == before
    sent = hub.files("alice/micro")
    assert "alice/micro" in sent["README.md"].decode()
    assert {"modeling_flashkat.py", "configuration_flashkat.py", "README.md"} <= sent.keys()


def test_a_written_card_keeps_the_license_of_the_one_on_the_branch(hub, bare_folder):
    push(bare_folder, "alice/micro", license="mit")
    assert push(bare_folder, "alice/micro").empty
    assert "license: mit" in hub.files("alice/micro")["README.md"].decode()
    push(bare_folder, "alice/micro", license="apache-2.0")
    assert "license: apache-2.0" in hub.files("alice/micro")["README.md"].decode()


def test_interrupted(hub, model_folder, monkeypatch, capsys):
    """Ctrl-C during the upload gives one line and no commit, and the same command finishes it."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.lfs._upload_single_part", interrupt)
        assert main(["push", str(model_folder), "alice/micro"]) == 130
    assert capsys.readouterr().err == "flashkat push: interrupted; the same command again finishes it\n"
    assert hub.titles("alice/micro") == ["initial commit"]
    push(model_folder, "alice/micro")
    assert hub.titles("alice/micro") == FIRST


def test_what_if_sends_nothing(hub, model_folder, capsys):
    assert main(["push", str(model_folder), "alice/micro", "--what-if", "--private"]) == 0
    text = capsys.readouterr().out
    assert "alice/micro, a new repository, private; branch main\n" in text
    assert text.endswith("alice/micro: nothing was sent (--what-if)\n")
    assert writes(hub) == []
    assert hub.repositories == {}


def test_private_branches_and_pull_requests(hub, model_folder, capsys):
    assert main(["push", str(model_folder), "kan-lab/micro", "--private"]) == 0
    assert hub.repositories["models", "kan-lab/micro"].private
    push(model_folder, "kan-lab/micro", private=True)
    with pytest.raises(ValueError, match="it exists and is private"):
        push(model_folder, "kan-lab/micro", private=False)
    main_files = hub.files("kan-lab/micro")

    change_weights(model_folder)
    assert main(["push", str(model_folder), "kan-lab/micro", "--revision", "try/1"]) == 0
    assert "branch try/1, new" in capsys.readouterr().out
    assert (
        hub.files("kan-lab/micro", "try/1")["model.safetensors"]
        == (model_folder / "model.safetensors").read_bytes()
    )
    assert (
        main(["push", str(model_folder), "kan-lab/micro", "--revision", "try/1"]) == 0
    )  # as it is there already
    assert hub.titles("kan-lab/micro", "try/1") == ["Upload FlashKAT", *FIRST]

    assert main(["push", str(model_folder), "kan-lab/micro", "--pr"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/kan-lab/micro/discussions/1"
    assert hub.titles("kan-lab/micro", "refs/pr/1") == ["Upload FlashKAT", *FIRST]
    push(model_folder, "kan-lab/micro", revision="refs/pr/1")  # adds nothing
    assert hub.titles("kan-lab/micro", "refs/pr/1") == ["Upload FlashKAT", *FIRST]
    assert hub.files("kan-lab/micro") == main_files


def test_a_new_branch_with_the_content_of_main(hub, model_folder):
    push(model_folder, "alice/micro")
    push(model_folder, "alice/micro", revision="copy")
    assert hub.titles("alice/micro", "copy") == FIRST


def test_a_pull_request_to_somebody_elses_repository(hub, model_folder):
    hub.add("bob/micro")
    result = push(model_folder, "bob/micro", create_pr=True)
    assert result.url == f"{hub.url}/bob/micro/discussions/1"
    assert hub.titles("bob/micro") == ["initial commit"]
    assert "model.safetensors" in hub.files("bob/micro", "refs/pr/1")


def test_shards_replace_a_single_file(hub, model_folder):
    """The old file would be loaded, so it goes in the same commit; what others put there stays."""
    push(model_folder, "alice/micro")
    repository = hub.repositories["models", "alice/micro"]
    repository.refs["refs/heads/main"].files["demo.gif"] = repository.refs["refs/heads/main"].files[
        "config.json"
    ]
    model = FlashKATForImageClassification.from_pretrained(model_folder)
    (model_folder / "model.safetensors").unlink()
    model.save_pretrained(model_folder, max_shard_size="100KB")
    hub.part_size = 40_000  # LFS uploads in several parts
    result = push(model_folder, "alice/micro")
    assert result.deleted == ["model.safetensors"]
    assert hub.titles("alice/micro") == ["Upload FlashKAT", *FIRST]
    names = hub.files("alice/micro").keys()
    assert {"demo.gif", "model.safetensors.index.json"} <= names
    assert "model.safetensors" not in names
    assert sum(name.endswith(".safetensors") for name in names) >= 4
    assert any("/complete/" in line for line in hub.requests)
    loaded = FlashKATForImageClassification.from_pretrained("alice/micro")
    pairs = zip(loaded.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_long_listing_comes_in_pages(hub, model_folder):
    push(model_folder, "alice/micro")
    hub.page_size = 3
    assert push(model_folder, "alice/micro").empty


def test_training_state_only_on_request(hub, model_folder, capsys):
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "random_states_0.pkl",
        "trainer_state.json",
        "notes.docx",
    ):
        (model_folder / name).write_bytes(b"{}")
    (model_folder / "checkpoint-5").mkdir()
    assert main(["push", str(model_folder), "alice/micro"]) == 0
    text = capsys.readouterr().out
    assert text.count("left out: training state") == 4
    assert "left out: a folder" in text
    assert "left out: not a part of a model" in text
    plain = hub.files("alice/micro").keys()
    assert not {"training_args.bin", "optimizer.pt", "random_states_0.pkl", "trainer_state.json"} & plain
    assert main(["push", str(model_folder), "alice/micro", "--include-training-state"]) == 0
    added = hub.files("alice/micro").keys() - plain
    assert added == {"training_args.bin", "optimizer.pt", "random_states_0.pkl", "trainer_state.json"}


def test_paths_of_this_machine_are_shortened(hub, model_folder):
    data = model_folder.parent / "photos"
    data.mkdir()
    home = "/" + "home/alice/"
    settings = {
        "data": str(data),
        "command": f"finetune.py --data {home}photos",
        "labels": ["/m/01g317", "a/b"],
    }
    (model_folder / "settings.json").write_text(json.dumps(settings))
    (model_folder / "metrics.jsonl").write_text(json.dumps({"model": f"{home}vit/best", "loss": 0.5}) + "\n")
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "runs/first"}))
    push(model_folder, "alice/micro")
    sent = hub.files("alice/micro")
    expected = {"data": "photos", "command": "finetune.py --data photos", "labels": ["/m/01g317", "a/b"]}
    assert json.loads(sent["settings.json"]) == expected
    assert json.loads(sent["metrics.jsonl"]) == {"model": "best", "loss": 0.5}
    assert json.loads(sent["config.json"]) == config
    assert json.loads((model_folder / "settings.json").read_text()) == settings


@pytest.mark.parametrize("several_files", [False, True])
def test_hf_xet(hub, model_folder, monkeypatch, several_files):
    """The default way of huggingface_hub 2 makes one commit, where `upload_folder` would make several."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    if several_files:
        model = FlashKATForImageClassification.from_pretrained(model_folder)
        (model_folder / "model.safetensors").unlink()
        model.save_pretrained(model_folder, max_shard_size="100KB")
    hub.fail("POST .*/commit/", status=403)
    with pytest.raises(ValueError, match="gives no right"):
        push(model_folder, "alice/micro")
    assert hub.files("alice/micro").keys() == {".gitattributes"}
    push(model_folder, "alice/micro")
    assert hub.titles("alice/micro") == FIRST
    assert not any("/objects/batch" in line for line in hub.requests)
    sent = hub.files("alice/micro")
    for path in model_folder.iterdir():
        assert sent[path.name] == path.read_bytes()
    hub.requests.clear()
    assert push(model_folder, "alice/micro").empty
    assert writes(hub) == []


def test_hf_xet_is_refused(hub, model_folder, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.fail("xet-write-token", status=403, times=99)
    with pytest.raises(
        ValueError, match=r"alice/micro: the access token gives no right to do this with alice/micro$"
    ):
        push(model_folder, "alice/micro")
    assert hub.files("alice/micro").keys() == {".gitattributes"}


def test_upload_script(hub, model_folder):
    """examples/upload.py is `push` with the settings of the other scripts."""
    import runpy

    script = runpy.run_path(str(ROOT / "examples/upload.py"))
    script["main"]([str(model_folder), "alice/micro", "--private"])
    assert hub.repositories["models", "alice/micro"].private
    with pytest.raises(SystemExit, match="does not allow the name"):
        script["main"]([str(model_folder), "alice/--"])


def test_folder_of_another_model(hub, model_folder, tmp_path):
    """A headless or a resized model does not pass as the one that its config describes."""
    FlashKATForImageClassification(micro_config(num_labels=3)).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", model_folder)
    with pytest.raises(ValueError, match=r"classifier\.(bias|weight) is \(3,.*by config\.json"):
        push(model_folder, "alice/micro")
    assert hub.requests == []


@pytest.mark.parametrize("what_if", [True, False])
def test_the_token_is_looked_for_before_anything_is_prepared(hub, bare_folder, monkeypatch, what_if):
    """Loading the model and drawing its functions take seconds."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("flashkat_hf.hub.upload.stage", None)
    with pytest.raises(ValueError, match=r"cannot push to alice/micro: there is no access token; log in"):
        push(bare_folder, "alice/micro", what_if=what_if)
    assert hub.requests == []


def test_what_a_killed_push_left_goes_with_the_next(hub, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    leftover = tmp_path / "temporary/flashkat-push-killed"
    leftover.mkdir(parents=True)
    (leftover / "README.md").touch()
    push(model_folder, "alice/micro", what_if=True)
    assert list((tmp_path / "temporary").iterdir()) == []
