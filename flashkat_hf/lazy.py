"""Public names of a folder that are imported when they are first used, so that `flashkat --help` is quick."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def imported_at_first_use(package: str, homes: dict[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package.

    Args:
        package: its `__name__`.
        homes: the file of each public name, such as `{"train": ".run"}`.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
