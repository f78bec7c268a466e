"""The package's words to its user: errors in one line, warnings, missing packages."""

import importlib
import sys
from typing import Any


def one_line(problem: object, longest: int = 300) -> str:
    """Return a text, or the reason of an error, as one line; the class of an error that says nothing."""
    text = getattr(problem, "strerror", None) or str(problem)
    line = " ".join(str(text).split()) or type(problem).__name__
    return line if len(line) <= longest else f"{line[:longest]}..."


def warn(message: str) -> None:
    """Write a line to standard error."""
    print(message, file=sys.stderr, flush=True)


def extra(module: str, name: str = "train") -> Any:
    """Import a module that comes with an extra of that name.

    Raises:
        ImportError: it is missing; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is missing: pip install 'flashkat_hf[{name}]' ({error})") from error


def needs(module: str, name: str) -> Any:
    """Import a module of an extra, as `extra` does, for a command whose errors are of one line.

    Raises:
        ValueError: it is missing; the message has the command that installs it.
    """
    try:
        return extra(module, name)
    except ImportError as error:
        raise ValueError(str(error)) from error
