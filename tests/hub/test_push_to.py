"""`--push-to`: the best model goes to the Hub during training and at the end, and training never waits."""

import pytest
from small_runs import make_images, small_run

from flashkat_hf import FlashKATForImageClassification
from flashkat_hf.hub import background
from flashkat_hf.training import train

REPO = "alice/run"


@pytest.fixture
def settings(tmp_path):
    return small_run(make_images(tmp_path / "data"), tmp_path / "run", push_to=REPO)


def test_the_best_model_is_on_main(hub, settings):
    assert train(settings)
    assert hub.titles(REPO) == ["Upload the best model", "initial commit"]
    assert hub.titles(REPO, "checkpoints")[-2].startswith("Best model after ")
    pulled = FlashKATForImageClassification.from_pretrained(REPO).state_dict()
    local = FlashKATForImageClassification.from_pretrained(settings.output / "best").state_dict()
    assert all((pulled[name] == tensor).all() for name, tensor in local.items())
    assert "top-1 accuracy" in hub.files(REPO)["README.md"].decode()


def test_no_token_ends_it_before_the_model_is_built(hub, settings, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=f"cannot push to {REPO}"):
        train(settings)
    assert not settings.output.exists()


def test_a_run_without_its_hub_is_complete_and_says_what_is_missing(hub, settings, monkeypatch, capsys):
    pushers, finish = [], background.BackgroundPusher.finish

    def impatient(pusher, *args):
        pushers.append(pusher)
        return finish(pusher, *args, patience=1.0)

    monkeypatch.setattr(background.BackgroundPusher, "finish", impatient)
    hub.fail("POST .*/(preupload|commit|branch)", status=503, times=1000)
    assert train(settings)["top1"] >= 0
    assert (settings.output / "summary.json").is_file()
    said = capsys.readouterr().err
    assert f"`flashkat push {settings.output / 'best'} {REPO}` pushes it" in said
    assert hub.titles(REPO) == ["initial commit"]
    hub.faults.clear()
    pushers[0]._thread.join(20)
    assert not pushers[0]._thread.is_alive()
