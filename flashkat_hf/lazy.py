"""Public names of a folder that are imported when they are first used, so that `flashkat --help` is quick."""

import gc
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import resolve_name
from types import ModuleType
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


def import_uncollected(module: str, package: str) -> ModuleType:
    """Import a module that brings thousands of others, without looking for garbage meanwhile.

    What modules define stays until the process ends. Searching it for garbage again and again while it grows
    takes a fifth of the time of importing PyTorch and transformers; so Python's collector rests, and what is
    there afterwards is left out of its searches (`gc.freeze`), which the worker processes of a run inherit.

    Args:
        module: its name, perhaps relative.
        package: the `__package__` that the name is relative to.
    """
    if known := sys.modules.get(resolve_name(module, package)):
        return known
    collects = gc.isenabled()
    gc.disable()
    try:
        return import_module(module, package)
    finally:
        gc.freeze()
        if collects:
            gc.enable()
