"""Downloads that go wrong, alone and in the commands: an error of one line, and nothing is kept of them."""

import hashlib
from unittest.mock import MagicMock

import pytest
from helpers import original_state
from huggingface_hub import constants, errors, snapshot_download
from safetensors.torch import save

from flashkat_hf.checkpoints import downloads
from flashkat_hf.checkpoints.downloads import check_sha256, download
from flashkat_hf.cli import main

WEIGHTS, STORAGE = "resolve/.*/model.safetensors", "GET /storage/"


@pytest.fixture
def kat(hub):
    """A KAT in its original naming."""
    return hub.add("alice/kat", {"model.safetensors": save(original_state("kat"))})


def convert(tmp_path, name: str = "alice/kat") -> int:
    return main(["convert", name, str(tmp_path / "out"), "--set", "num_attention_heads=2"])


@pytest.mark.parametrize(
    ("pattern", "fault", "sentence"),
    [
        (WEIGHTS, {"status": 401}, "the Hub does not accept the access token"),
        (WEIGHTS, {"status": 403, "times": 2}, "the access token gives no right to do this with alice/kat"),
        (WEIGHTS, {"status": 404, "X_Error_Code": "RepoNotFound"}, "alice/kat does not exist, or is private"),
        (
            WEIGHTS,
            {"status": 404, "X_Error_Code": "RevisionNotFound"},
            "alice/kat has no such branch, tag or commit",
        ),
        (
            WEIGHTS,
            {"status": 429, "times": 9, "Retry_After": "60"},
            "the Hub limits requests (429) (injected); try again in 60 s",
        ),
        (WEIGHTS, {"status": 500, "times": 9}, "the Hub has a problem (500) (injected); try again later"),
        (STORAGE, {"status": 503}, "the Hub has a problem (503"),
        (STORAGE, {"kind": "cut", "times": 9}, "no connection to the Hub (RemoteProtocolError: peer closed"),
        (STORAGE, {"kind": "corrupt"}, "model.safetensors arrived damaged: its SHA-256 is"),
    ],
)
def test_a_download_that_fails(hub, kat, tmp_path, capsys, pattern, fault, sentence):
    hub.fail(pattern, **fault)
    assert convert(tmp_path) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    assert convert(tmp_path) == 0


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        (WEIGHTS, {"status": 429, "Retry_After": "5"}),
        (WEIGHTS, {"status": 503}),
        (STORAGE, {"kind": "cut"}),
        (STORAGE, {"kind": "slow", "seconds": 1.0}),
    ],
)
def test_a_download_that_recovers(hub, kat, tmp_path, monkeypatch, pattern, fault):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.fail(pattern, **fault)
    assert convert(tmp_path) == 0
    assert hub.faults[0].times == 0


def test_damaged_weights_are_not_loaded(hub, model_folder, capsys):
    hub.add("alice/micro", {path.name: path.read_bytes() for path in model_folder.iterdir()})
    hub.fail(STORAGE, kind="corrupt")
    assert main(["info", "alice/micro"]) == 1
    error = capsys.readouterr().err
    assert "model.safetensors arrived damaged: its SHA-256 is" in error
    assert error.count("\n") == 1
    assert main(["info", "alice/micro"]) == 0  # it was not kept in the cache


def test_names_in_a_repository_stay_in_their_folder(hub, tmp_path, model_folder, capsys):
    """A listing and an index that name files elsewhere write nothing outside."""
    evil = "../" * 6 + "evil.safetensors"
    files = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    weights = files.pop("model.safetensors")
    index = f'{{"metadata": {{}}, "weight_map": {{"classifier.bias": "{evil}"}}}}'.encode()
    hub.add("bob/index", {**files, "model.safetensors.index.json": index, evil: weights})
    hub.add("bob/listing", {**files, "model.safetensors": weights, "../evil.safetensors": weights})
    before = {path for path in tmp_path.rglob("*") if "hf_home" not in path.parts}
    assert convert(tmp_path, "bob/index") == 1
    error = capsys.readouterr().err
    assert f"model.safetensors.index.json names {evil}, which is no file beside it" in error
    assert main(["info", "bob/index"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="evil"):
        snapshot_download("bob/listing", local_dir=tmp_path / "copy")
    assert not any("evil" in line for line in hub.requests)
    after = {path for path in tmp_path.rglob("*") if not {"hf_home", "copy"} & set(path.parts)}
    assert after == before
    assert not list(tmp_path.rglob("*evil*"))


def test_checksum_in_the_name(tmp_path):
    right = hashlib.sha256(b"weights").hexdigest()
    for name, content in (
        (f"kat_{right}.pth", b"weights"),
        ("kat.pth", b"other"),
        (f"kat-{right[:63]}.pth", b"other"),
    ):
        (tmp_path / name).write_bytes(content)
        check_sha256(tmp_path / name)
    damaged = tmp_path / f"kat_{right}.pth"
    damaged.write_bytes(b"weight")
    with pytest.raises(ValueError, match=r"damaged or another file: its SHA-256 is [0-9a-f]{64}") as caught:
        check_sha256(damaged)
    assert hashlib.sha256(b"weight").hexdigest() in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.RepositoryNotFoundError(
                "404 Client Error.\n\nRepository Not Found for url", response=MagicMock()
            ),
            r"\(owner/name does not exist, or is private and not yours\)",
        ),
        (
            errors.GatedRepoError("403 gated", response=MagicMock()),
            "asks for consent on its page, and you have not given it",
        ),
        (
            errors.RevisionNotFoundError("404 revision", response=MagicMock()),
            "owner/name has no such branch, tag or commit",
        ),
        (errors.LocalEntryNotFoundError("no connection"), "no network or offline mode"),
        (errors.HFValidationError("bad id"), r"\(bad id\)"),
        (ConnectionError("refused"), r"no connection to the Hub \(ConnectionError: refused\)"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_errors_of_the_hub(monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(downloads, "hf_hub_download", fail)
    with pytest.raises(ValueError, match=message) as caught:
        download("owner/name", "model.safetensors")
    assert "cannot get model.safetensors of owner/name" in str(caught.value)
    assert "give the path of the file or folder instead" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_the_repository_lacks(monkeypatch):
    def fail(*args, **kwargs):
        raise errors.RemoteEntryNotFoundError("404", response=MagicMock())

    monkeypatch.setattr(downloads, "hf_hub_download", fail)
    assert download("owner/name", "model.safetensors") is None


def test_revision_and_token_reach_the_hub(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        downloads, "hf_hub_download", lambda *args, **kwargs: seen.append((args, kwargs)) or str(tmp_path)
    )
    assert download("owner/name", "file", "v2", "secret") == tmp_path
    assert seen == [
        (("owner/name", "file"), {"revision": "v2", "token": "secret", "local_files_only": False})
    ]


def test_offline(monkeypatch, tmp_path):
    """huggingface_hub itself, offline, with an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="no network or offline mode, and it is not in the cache"):
        download("adamdad/kat_tiny_patch16_224", "model.safetensors")
