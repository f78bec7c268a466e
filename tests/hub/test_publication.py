"""`flashkat publish`: conversion, proof, card and push; a micro KAT stands in for the published ones."""

import hashlib
import io

import pytest
import torch
from helpers import MICRO, original_state

from flashkat_hf import FlashKATForImageClassification
from flashkat_hf.checkpoints.published import PUBLISHED, RELEASE_REPOSITORY, Published
from flashkat_hf.cli import main
from flashkat_hf.conversion.source import read_source
from flashkat_hf.hub import card

NAMES = ("kat-tiny", "kat-small")  # cards exist under these names


@pytest.fixture
def published(hub, monkeypatch):
    """The table has two rows, and the Hub their files, named by their checksums as the real ones are."""
    buffer = io.BytesIO()
    state = original_state("kat")
    state |= {
        name: state[name].repeat_interleave(100, 0) for name in ("head.weight", "head.bias")
    }  # 1,000 labels
    torch.save({"state_dict": state}, buffer)
    name = f"kat_micro_{hashlib.sha256(buffer.getvalue()).hexdigest()}.pth"
    hub.add(RELEASE_REPOSITORY, {name: buffer.getvalue()})
    rows = dict(PUBLISHED)
    PUBLISHED.clear()
    PUBLISHED.update({row: Published(row, f"adamdad/{row}", name, 12.3) for row in NAMES})
    sizes = {name: MICRO[name] for name in ("hidden_size", "intermediate_size")} | {"num_attention_heads": 1}
    monkeypatch.setattr(card, "SIZES", dict.fromkeys(card.SIZES, sizes))
    yield name
    PUBLISHED.clear()
    PUBLISHED.update(rows)


def test_publish_one(hub, published, capsys):
    assert main(["publish", "kat-tiny", "--namespace", "kan-lab", "--private"]) == 0
    text = capsys.readouterr().out
    assert "verified against the source in float64" in text
    assert text.splitlines()[-1] == f"{hub.url}/kan-lab/kat-tiny/commit/{hub.head('kan-lab/kat-tiny')}"
    assert hub.titles("kan-lab/kat-tiny") == [f"Convert {published}", "initial commit"]
    assert hub.repositories["models", "kan-lab/kat-tiny"].private
    card = hub.files("kan-lab/kat-tiny")["README.md"].decode()
    assert "kan-lab/kat-tiny" in card
    assert "base_model: adamdad/kat_tiny_patch16_224" in card
    loaded = FlashKATForImageClassification.from_pretrained("kan-lab/kat-tiny")
    source = read_source("kat-tiny").state
    assert torch.equal(loaded.classifier.weight, source["head.weight"])
    assert main(["publish", "kat-tiny", "--namespace", "kan-lab"]) == 0
    assert "has all of it already" in capsys.readouterr().out
    assert len(hub.titles("kan-lab/kat-tiny")) == 2


def test_all_goes_on_after_a_failure(hub, published, capsys):
    hub.fail("POST /api/models/alice/kat-tiny/commit/", status=403)
    assert main(["publish", "all", "--namespace", "alice"]) == 1
    output = capsys.readouterr()
    assert output.err.startswith(
        "flashkat publish: 1 of 2 are not published: kat-tiny (cannot push to alice/kat-tiny: "
    )
    assert output.err.count("\n") == 1
    assert hub.titles("alice/kat-tiny") == ["initial commit"]
    assert hub.titles("alice/kat-small") == [f"Convert {published}", "initial commit"]


def test_what_if(hub, published, capsys):
    assert main(["publish", "kat-small", "--namespace", "alice", "--what-if"]) == 0
    text = capsys.readouterr().out
    assert "model.safetensors" in text
    assert text.endswith("alice/kat-small: nothing was sent (--what-if)\n")
    assert all(line.startswith(("GET", "HEAD")) for line in hub.requests)


@pytest.mark.parametrize(
    ("namespace", "token", "sentence"),
    [
        ("bob", "hf_alice", "the rights to create a model under the namespace bob"),
        ("alice", "", "there is no access token"),
        ("a b", "hf_alice", "the Hub does not allow the name 'a b/kat-tiny'"),
    ],
)
def test_refused_before_the_download(hub, published, monkeypatch, capsys, namespace, token, sentence):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["publish", "all", "--namespace", namespace]) == 1
    assert sentence in capsys.readouterr().err
    assert not any("adamdad" in line for line in hub.requests)


def test_a_damaged_release_file(hub, published, capsys):
    hub.fail("GET /storage/", kind="corrupt")
    assert main(["publish", "kat-tiny", "--namespace", "alice"]) == 1
    assert "arrived damaged" in capsys.readouterr().err
    assert "alice/kat-tiny" not in str(hub.repositories)
    with pytest.raises(SystemExit):
        main(["publish", "kat-huge", "--namespace", "alice"])
