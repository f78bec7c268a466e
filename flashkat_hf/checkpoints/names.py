"""Which names can be models: looked at by every command before it imports PyTorch."""

import re
from pathlib import Path

from ..files import check_utf8
from .published import PUBLISHED

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".tar", ".ckpt")
HINT = "; a KAT, ViT or DeiT is converted first: flashkat convert {} OUTPUT"


def check_model_name(name: str) -> None:
    """Refuse what is neither a folder nor a Hub id, sooner than the Hub says so, and the folder of a run.

    Raises:
        ValueError: in one line; with the command that converts, for a file of weights or a published KAT.
    """
    check_utf8(name, "the model")
    path, hint = Path(name), HINT.format(name)
    if path.is_dir():
        best = path / "best"
        if (best / "config.json").is_file() and not (path / "config.json").exists():
            raise ValueError(f"{name} is the folder of a run, not of a model; try {best}")
        return
    if name in PUBLISHED and not path.exists():
        raise ValueError(f"{name} is the name of a published KAT, not a folder{hint}")
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, flags=re.ASCII)
    if path.exists() or not is_id or (len(path.parts) > 1 and path.parent.is_dir()):
        is_source = path.is_file() and path.suffix in WEIGHT_SUFFIXES
        raise ValueError(f"{name} is not a folder{hint if is_source else ''}")


def check_source_name(name: str) -> None:
    """Refuse what cannot be converted: no file, no folder, no Hub id and no published name.

    Raises:
        ValueError: in one line.
    """
    path = Path(name).expanduser()
    is_path = path.suffix in WEIGHT_SUFFIXES or path.parent.is_dir()
    is_id = not is_path and re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    if not (path.is_dir() or path.is_file() or name in PUBLISHED or is_id):
        raise ValueError(
            f"{name} is no file, no folder, no Hub id (owner/name) and no published name "
            f"({', '.join(PUBLISHED)})"
        )
