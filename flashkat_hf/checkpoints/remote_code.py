"""The code that a checkpoint brings.

Plain copies of the package's own files, for those who do not have the package.

`save_pretrained` of a config or model writes it by itself (`FlashKATConfig._auto_class`); here it is written
into a folder that was made in another way, and checked. The files are the modeling file and what it imports
by relative names, directly or not; they need torch and transformers, and use triton where it is installed.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from ..model import modeling_flashkat
from ..model.configuration_flashkat import AUTO_MAP

MODELING = Path(modeling_flashkat.__file__)
CODE_FILES = tuple(sorted({Path(path).name for path in (MODELING, *get_relative_import_files(MODELING))}))


def write_code(folder: str | Path) -> None:
    """Copy the code into a model's folder and complete `auto_map` in its config.json.

    What is right stays untouched.

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
            new = folder / "config.json.new"
            text = json.dumps(config | {"auto_map": auto_map}, indent=2, sort_keys=True) + "\n"
            new.write_text(text, encoding="utf-8")  # a full disk must not cost the old one
            new.replace(folder / "config.json")
    except OSError as error:
        raise ValueError(f"cannot write code into {folder}: {error.strerror or error}") from error


def check_code(folder: str | Path) -> list[str]:
    """What keeps a model's folder from being loaded without the package, in words; empty if nothing does.

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
    """A FlashKAT's config.json.

    Raises:
        ValueError: there is none, or another model's.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != "flashkat":
        raise ValueError(f"{path} is not the config of a FlashKAT")
    return config


def _differs(copy: Path) -> bool:
    return not copy.is_file() or copy.read_bytes() != MODELING.with_name(copy.name).read_bytes()
