"""The code that a checkpoint brings: plain copies of the package's own files, for those who lack the package.

`save_pretrained` of a config or model writes it by itself (`FlashKATConfig._auto_class`); here it is written
into a folder that was made in another way, and checked. The files are the modeling files and what they import
by relative names, directly or not; they need torch and transformers, and use triton where it is installed.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from ..files import read_json, to_json, write_text
from ..messages import one_line
from ..model import modeling_flashkat
from ..model.configuration_flashkat import AUTO_MAP

MODELING = Path(modeling_flashkat.__file__)
CODE_FILES = tuple(sorted({Path(path).name for path in (MODELING, *get_relative_import_files(MODELING))}))


def write_code(folder: str | Path) -> None:
    """Copy the code into a model's folder and complete `auto_map` in its config.json; what is right stays.

    Raises:
        ValueError: `folder` holds no FlashKAT's config.json, or cannot be written.
    """
    folder = Path(folder)
    config = read_config(folder)
    auto_map = {**(config.get("auto_map") or {}), **AUTO_MAP}
    try:
        for name in CODE_FILES:
            if _differs(folder / name):
                shutil.copyfile(MODELING.with_name(name), folder / name)
        if auto_map != config.get("auto_map"):
            write_text(folder / "config.json", to_json(config | {"auto_map": auto_map}, sort_keys=True))
    except OSError as error:
        raise ValueError(f"cannot write code into {folder}: {one_line(error)}") from error


def check_code(folder: str | Path) -> list[str]:
    """List in words what keeps a model's folder from being loaded without the package; empty if nothing does.

    Raises:
        ValueError: `folder` holds no FlashKAT's config.json.
    """
    folder = Path(folder)
    auto_map = read_config(folder).get("auto_map") or {}
    problems = []
    for name in CODE_FILES:
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif _differs(folder / name):
            problems.append(f"{name} differs from the package's")
    problems += [
        f"auto_map in config.json has {auto_map.get(name)!r} for {name}, not {reference!r}"
        for name, reference in AUTO_MAP.items()
        if auto_map.get(name) != reference
    ]
    return problems


def read_config(folder: Path) -> dict[str, Any]:
    """Read a FlashKAT's config.json.

    Raises:
        ValueError: there is none, or another model's.
    """
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") != "flashkat":
        raise ValueError(f"{path} is not the config of a FlashKAT")
    return config


def _differs(copy: Path) -> bool:
    """Tell whether a copy of the package's file of that name is missing or another."""
    return not copy.is_file() or copy.read_bytes() != MODELING.with_name(copy.name).read_bytes()
