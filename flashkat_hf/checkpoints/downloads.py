"""Files from the Hub, held against their checksums."""

import hashlib
import os
import re
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from ..hub_errors import explain


class NotReachableError(ValueError):
    """The Hub does not answer, or must not be asked, and the file is not in the cache."""


def download(
    repository: str, file: str, revision: str | None = None, token: str | None = None, offline: bool = False
) -> Path | None:
    """Return a file of the Hub in the local cache, or None if the repository has no such file.

    Raises:
        NotReachableError: it is not in the cache, and there is no network, or `offline` or huggingface_hub's
            offline mode forbids it.
        ValueError: in one line, for every other error of the Hub, with what to do about it; what arrived is
            damaged.
    """
    try:
        path = hf_hub_download(repository, file, revision=revision, token=token, local_files_only=offline)
    except LocalEntryNotFoundError as error:
        reason = "no network or offline mode"
        if isinstance(error.__cause__, HfHubHTTPError):
            reason = explain(error.__cause__, repository)
        raise NotReachableError(_failure(repository, file, f"{reason}, and it is not in the cache")) from None
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise ValueError(_failure(repository, file, explain(error, repository))) from None
    check_cached(Path(path))
    return Path(path)


def check_sha256(path: Path) -> None:
    """Hold a file against the SHA-256 at the end of its name; a name without one passes.

    Raises:
        ValueError: they differ.
    """
    expected = re.search(r"[_-]([0-9a-f]{64})$", path.stem)
    if expected and (sha256 := _sha256(path)) != expected[1]:
        raise ValueError(
            f"{path} is damaged or another file: its SHA-256 is {sha256}, not the one in its name; "
            "delete it and download it again"
        )


def check_cached(path: Path) -> None:
    """Hold a large file of the cache against its SHA-256 by the Hub, which names it there; others pass.

    Raises:
        ValueError: they differ; the file is removed from the cache.
    """
    blob = Path(os.readlink(path)).name if path.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{64}", blob) and (sha256 := _sha256(path)) != blob:
        path.resolve().unlink()
        path.unlink()
        raise ValueError(
            f"{path.name} arrived damaged: its SHA-256 is {sha256}, not {blob}; download it again"
        )


def check_cached_weights(repository: str) -> None:
    """Apply `check_cached` to all safetensors files that the cache has of the main branch.

    Raises:
        ValueError: one is damaged; it is removed from the cache.
    """
    config = try_to_load_from_cache(repository, "config.json")
    if isinstance(config, str):
        for path in sorted(Path(config).parent.glob("*.safetensors")):
            check_cached(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _failure(repository: str, file: str, reason: str) -> str:
    return (
        f"cannot get {file} of {repository} from the Hub ({reason}); download it on another machine and "
        "give the path of the file or folder instead"
    )
