"""The published KAT checkpoints: names, files, checksums and accuracies, and downloads from the Hub."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from .hub_errors import explain

RELEASE_REPOSITORY = "adamdad/kat_pretained"  # spelled so


@dataclass(frozen=True)
class Published:
    """One row of the table.

    Attributes:
        name: what the command takes as source.
        repository: the Hub repository of the timm model.
        file: the release file in `RELEASE_REPOSITORY`; the tail of its name is its SHA-256.
        top1: ImageNet-1k top-1 in percent, as published.
    """

    name: str
    repository: str
    file: str
    top1: float


PUBLISHED = {
    row.name: row
    for row in (
        Published(
            "kat-tiny",
            "adamdad/kat_tiny_patch16_224",
            "kat_tiny_patch16_224_1f3ad3b2e69821f3d412f2924cf159a0e266f142d739cb68f68f796f5a0fe289.pth",
            74.6,
        ),
        Published(
            "kat-tiny-vitft",
            "adamdad/kat_tiny_patch16_224.vitft",
            "kat_tiny_patch16_224-finetune_64f124d003803e4a7e1aba1ba23500ace359b544e8a5f0110993f25052e402fb.pth",
            75.7,
        ),
        Published(
            "kat-small",
            "adamdad/kat_small_patch16_224",
            "kat_small_patch16_224_32487885cf13d2c14e461c9016fac8ad43f7c769171f132530941e930aeb5fe2.pth",
            81.2,
        ),
        Published(
            "kat-small-vitft",
            "adamdad/kat_small_patch16_224.vitft",
            "kat_small_patch_224-finetune_3ae087a4c28e2993468eb377d5151350c52c80b2a70cc48ceec63d1328ba58e0.pth",
            82.0,
        ),
        Published(
            "kat-base",
            "adamdad/kat_base_patch16_224",
            "kat_base_patch16_224_abff874d925d756d15cde97303f772a3460ddbd44b9c53fb9ce5cf15be230fb6.pth",
            82.3,
        ),
        Published(
            "kat-base-vitft",
            "adamdad/kat_base_patch16_224.vitft",
            "kat_base_patch16_224-finetune_440bf1ead9dd8ecab642078cfb60ae542f1fa33ca65517260501e02c011e38f2.pth",
            82.8,
        ),
    )
}
FLASHKAT_TOP1 = {
    "tiny": 74.6,
    "small": 81.4,
    "base": 82.2,
}  # FlashKAT's paper, trained anew; no weights published


def check_sha256(path: Path) -> None:
    """Hold a file against the SHA-256 at the end of its name; a name without one passes.

    Raises:
        ValueError: they differ.
    """
    if not (expected := re.search(r"[_-]([0-9a-f]{64})$", path.stem)):
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected[1]:
        raise ValueError(
            f"{path} is damaged or another file: its SHA-256 is {found}, not the one in its name; delete it and "
            "download it again"
        )


class NotReachableError(ValueError):
    """The Hub does not answer, or must not be asked, and the file is not in the cache."""


def download(
    repository: str, file: str, revision: str | None = None, token: str | None = None, offline: bool = False
) -> Path | None:
    """A file of the Hub in the local cache, or None if the repository has no such file.

    Raises:
        NotReachableError: it is not in the cache, and there is no network, or `offline` or huggingface_hub's
            offline mode forbids it.
        ValueError: in one line, for every other error of the Hub, with what to do about it; what arrived is
            damaged.
    """
    try:
        path = Path(
            hf_hub_download(repository, file, revision=revision, token=token, local_files_only=offline)
        )
    except LocalEntryNotFoundError as error:
        reason = "no network or offline mode"
        if isinstance(error.__cause__, HfHubHTTPError):
            reason = explain(error.__cause__, repository)
        raise NotReachableError(
            str(_unreachable(repository, file, f"{reason}, and it is not in the cache"))
        ) from None
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise _unreachable(repository, file, explain(error, repository)) from None
    check_cached(path)
    return path


def check_cached(path: Path) -> None:
    """Hold a large file of the cache against its SHA-256 by the Hub, which names it there; others pass.

    Raises:
        ValueError: they differ; the file is removed from the cache.
    """
    blob = Path(os.readlink(path)).name if path.is_symlink() else ""
    if not re.fullmatch(r"[0-9a-f]{64}", blob):
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != blob:
        path.resolve().unlink()
        path.unlink()
        raise ValueError(
            f"{path.name} arrived damaged: its SHA-256 is {found}, not {blob}; download it again"
        )


def check_cached_weights(repository: str) -> None:
    """`check_cached` for all safetensors files that the cache has of the main branch.

    Raises:
        ValueError: one is damaged; it is removed from the cache.
    """
    config = try_to_load_from_cache(repository, "config.json")
    if isinstance(config, str):
        for path in sorted(Path(config).parent.glob("*.safetensors")):
            check_cached(path)


def _unreachable(repository: str, file: str, reason: str) -> ValueError:
    return ValueError(
        f"cannot get {file} of {repository} from the Hub ({reason}); download it on another machine and give the path "
        "of the file or folder instead"
    )
