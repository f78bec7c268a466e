"""Pushing while training goes on: it never blocks, never raises, and says at the end what is missing."""

import shutil
import threading
import time

import pytest
from safetensors.torch import load_file, save_file

from flashkat_hf.hub import background
from flashkat_hf.hub.background import BackgroundPusher

COMMIT = "POST .*/commit/"


@pytest.fixture
def pusher(hub):
    return BackgroundPusher("alice/run", delays=(0.05,))


@pytest.fixture
def warnings(capsys):
    """Give a function that returns all that was written to standard error so far."""
    texts = []

    def read() -> str:
        texts.append(capsys.readouterr().err)
        return "".join(texts)

    return read


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def change(folder, value):
    """Replace the folder, as a trainer does, by one with other weights."""
    new = folder.with_name("new")
    shutil.copytree(folder, new)
    state = load_file(folder / "model.safetensors")
    state["classifier.bias"].fill_(value)
    (new / "model.safetensors").unlink()
    save_file(state, new / "model.safetensors", {"format": "pt"})
    shutil.rmtree(folder)
    new.rename(folder)


def leftovers(folder):
    return [path.name for path in folder.parent.glob(".*")]


def test_checkpoints_to_a_branch_and_the_end_to_main(hub, pusher, model_folder):
    pusher.submit(model_folder, "step 1")
    wait_until(lambda: hub.titles("alice/run", "checkpoints")[:1] == ["step 1"])
    assert hub.titles("alice/run") == ["initial commit"]
    change(model_folder, 2)
    pusher.submit(model_folder, "step 2")
    change(model_folder, 3)  # what is pushed is what was there
    wait_until(lambda: hub.titles("alice/run", "checkpoints")[:1] == ["step 2"])
    second = hub.files("alice/run", "checkpoints")["model.safetensors"]
    assert second != (model_folder / "model.safetensors").read_bytes()
    assert pusher.finish(model_folder, "the end") == []
    assert hub.titles("alice/run") == ["the end", "initial commit"]
    assert hub.titles("alice/run", "checkpoints") == ["step 2", "step 1", "initial commit"]
    assert hub.files("alice/run")["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()
    assert leftovers(model_folder) == []
    assert not pusher._thread.is_alive()


def test_only_the_newest_waits(hub, pusher, model_folder):
    hub.fail(COMMIT, kind="slow", seconds=0.5)
    started = time.monotonic()
    pusher.submit(model_folder, "step 1")
    wait_until(lambda: any("/commit/" in line for line in hub.requests))
    for step in (2, 3, 4):
        change(model_folder, step)
        pusher.submit(model_folder, f"step {step}")
    assert time.monotonic() - started < 5
    assert pusher.finish(None, "") == []
    assert hub.titles("alice/run", "checkpoints") == ["step 4", "step 1", "initial commit"]
    assert hub.titles("alice/run") == ["initial commit"]
    assert leftovers(model_folder) == []


def test_it_is_tried_again(hub, pusher, model_folder, warnings):
    hub.fail("GET /api/models/alice/run/revision", status=503, times=7)
    pusher.submit(model_folder, "step 1")
    wait_until(lambda: "checkpoints" in str(hub.repositories["models", "alice/run"].refs))
    assert pusher.finish(model_folder, "the end") == []
    assert hub.titles("alice/run", "checkpoints")[0] == "step 1"
    assert hub.titles("alice/run")[0] == "the end"
    assert "is not pushed yet: cannot push to alice/run: the Hub has a problem (503" in warnings()


def test_the_hub_stays_away(hub, pusher, model_folder, warnings):
    """Training goes on, and the end says what to do; nothing on the disk is lost or left over."""
    hub.fail(".*", status=503, times=10_000)
    pusher.submit(model_folder, "step 1")
    wait_until(lambda: "is not pushed yet" in warnings())
    pusher.submit(model_folder, "step 2")
    lines = pusher.finish(model_folder, "the end", patience=0.5)
    assert len(lines) == 2
    assert lines[0].startswith(f"{model_folder} (the end) was not pushed: ")
    assert lines[0].endswith(f"`flashkat push {model_folder} alice/run` pushes it")
    assert lines[1].startswith(f"{model_folder} (step 2) was not pushed: ")
    assert lines[1].endswith(f"`flashkat push {model_folder} alice/run --revision checkpoints` pushes it")
    assert (model_folder / "model.safetensors").is_file()
    pusher._thread.join(20)
    assert not pusher._thread.is_alive()
    assert leftovers(model_folder) == []
    assert all("hf_alice" not in text for text in (warnings(), *lines))


def test_what_the_hub_refuses_is_not_tried_again(hub, pusher, model_folder, tmp_path):
    hub.fail(COMMIT, status=403)
    pusher.submit(model_folder, "step 1")
    wait_until(lambda: any("/commit/" in line for line in hub.requests))
    (tmp_path / "empty").mkdir()
    pusher.submit(tmp_path / "empty", "step 2")
    pusher.submit(tmp_path / "nothing", "step 3")
    lines = pusher.finish(model_folder, "the end")
    assert any("(step 1) was not pushed" in line and "gives no right" in line for line in lines)
    assert any("(step 2) was not pushed" in line and "has no config.json" in line for line in lines)
    assert any("(step 3) was not pushed" in line and "No such file" in line for line in lines)
    assert all("-push-" not in line for line in lines)
    assert hub.titles("alice/run")[0] == "the end"


def test_where_files_cannot_be_linked(hub, pusher, model_folder, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(background.os, "link", refuse)
    pusher.submit(model_folder, "step 1")
    assert pusher.finish(None, "") == []
    assert hub.titles("alice/run", "checkpoints")[0] == "step 1"


@pytest.mark.parametrize(
    ("token", "repo", "branch", "sentence"),
    [
        ("", "alice/run", "x", "there is no access token"),
        ("hf_reader", "alice/run", "x", "may only read"),
        ("hf_alice", "bob/run", "x", "gives no right"),
        ("hf_alice", "run", "x", "owner/name is expected"),
        ("hf_alice", "alice/run", "a b", "cannot be the name of a branch"),
    ],
)
def test_refused_before_training_starts(hub, monkeypatch, token, repo, branch, sentence):
    monkeypatch.setenv("HF_TOKEN", token)
    before = [thread.name for thread in threading.enumerate()].count("flashkat-push")
    with pytest.raises(ValueError, match=sentence):
        BackgroundPusher(repo, branch=branch)
    assert hub.repositories == {}
    assert [thread.name for thread in threading.enumerate()].count("flashkat-push") == before


def test_what_a_killed_run_has_left_is_removed(hub, pusher, model_folder):
    leftover = model_folder.with_name(f".{model_folder.name}-push-abc")
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"x")
    pusher.submit(model_folder, "step 1")
    assert pusher.finish(None, "") == []
    assert leftovers(model_folder) == []
    assert hub.titles("alice/run", "checkpoints")[0] == "step 1"
