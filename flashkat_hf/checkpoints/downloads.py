"""Files from the Hub, held against their checksums."""

import hashlib
import os
import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from ..hub_errors import explain
from .weights import WEIGHT_FILES, shard_map

CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")


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


class Repository:
    """A model's files in a Hub repository, all of one commit; once the Hub is away, those in the cache."""

    def __init__(self, name: str, revision: str | None = None, token: str | None = None):
        self.name, self.revision, self.token = name, revision, token
        self._unreachable: NotReachableError | None = None

    def get(self, file: str) -> Path | None:
        """Return a file, or None where there is none, or where neither the Hub nor the cache can tell.

        Raises:
            ValueError: in one line, as `download`.
        """
        offline = self._unreachable is not None
        try:
            path = download(self.name, file, self.revision, self.token, offline=offline)
        except NotReachableError as error:
            self._unreachable = self._unreachable or error
            return None
        if path and re.fullmatch("[0-9a-f]{40}", path.parent.name):
            self.revision = path.parent.name  # what is asked for next comes from the same commit
        return path

    def weights(self) -> Path:
        """Download weights, all shards of them, and configs; return the file of weights or the index.

        Raises:
            ValueError: in one line: the Hub or the network fails, or there are no weights.
        """
        for name in WEIGHT_FILES:
            if weights := self.get(name):
                shards = shard_map(weights).values() if weights.suffix == ".json" else ()
                for shard in sorted(set(map(str, shards))):
                    if Path(shard).name != shard:
                        raise ValueError(f"{self.name}: {name} names {shard}, which is no file beside it")
                    if self.get(shard) is None:
                        raise self.absence(f"{self.name}: {name} names {shard}, which is not there")
                for config in CONFIG_FILES:
                    self.get(config)
                return weights
        raise self.absence(
            f"{self.name} has neither {' nor '.join(WEIGHT_FILES)}; "
            "download its weights and give the file's path"
        )

    def absence(self, problem: str) -> ValueError:
        """Return the error for a file that is not there: the network's, if that was away."""
        return self._unreachable or ValueError(problem)


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _failure(repository: str, file: str, reason: str) -> str:
    return (
        f"cannot get {file} of {repository} from the Hub ({reason}); download it on another machine and "
        "give the path of the file or folder instead"
    )
