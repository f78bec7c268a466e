"""Downloads: checksums, and the Hub's errors in one line."""

import hashlib
from unittest.mock import MagicMock

import pytest
from huggingface_hub import errors

from flashkat_hf.checkpoints import downloads
from flashkat_hf.checkpoints.downloads import check_sha256, download


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
