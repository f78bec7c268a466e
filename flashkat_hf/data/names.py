"""Which names can be sources of data: looked at by every command before it imports PyTorch."""

import re
from pathlib import Path

from ..files import check_utf8


def check_source(source: str | None) -> None:
    """Refuse what is neither "digits", a folder, a pattern of tar files nor a Hub id.

    Raises:
        ValueError: in one line.
    """
    if source is not None:
        check_utf8(source, "the data")
    if source not in (None, "digits") and not (Path(source).is_dir() or is_tar(source) or is_hub_id(source)):
        raise ValueError(f"{source} is not a folder")


def is_tar(source: str) -> bool:
    """Return whether a source is written as tar files are, one or by a pattern."""
    return source.endswith((".tar", ".tar}")) or ".tar::" in source


def is_hub_id(source: str) -> bool:
    """Return whether a source is written as a data set on the Hub is, and means nothing on this machine."""
    path = Path(source)
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    return bool(is_id) and not path.exists() and not path.parent.exists()
