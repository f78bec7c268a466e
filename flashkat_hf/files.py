"""Files and folders that appear whole or not at all, and JSON."""

import fcntl
import json
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .messages import one_line


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        ValueError: the file cannot be read, is not JSON or holds something else than an object; in one line.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {one_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"cannot read {path}: it is not JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def to_json(values: Any, *, indent: int | None = 2, **options: Any) -> str:
    """Return the text of a JSON file, or of a JSON line where `indent` is None; options of `json.dumps`."""
    return json.dumps(values, indent=indent, **options) + "\n"


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one step that survives a crash and a full disk.

    Raises:
        OSError: the file cannot be written; the old one stands.
    """
    with replacing(path, folder=False) as new:
        new.write_text(text, encoding="utf-8")


def expand_homes(options: Namespace) -> None:
    """Replace a ~ at the beginning of paths, which the shell leaves in --data=~/photos."""
    for name, value in vars(options).items():
        if isinstance(value, str | Path) and name != "message":
            setattr(options, name, type(value)(os.path.expanduser(value)))
        elif isinstance(value, list):
            setattr(options, name, [item.expanduser() if isinstance(item, Path) else item for item in value])


def check_utf8(name: str, what: str) -> None:
    """Refuse a name that no text can hold: of bytes that are no UTF-8.

    Args:
        name: as Python reads it from the disk or the command line.
        what: it is the name of, for the message.

    Raises:
        ValueError: in one line.
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the name of {what}, {name!a}, is no UTF-8; rename it") from error


@contextmanager
def replacing(target: Path, folder: bool = True) -> Iterator[Path]:
    """Give a new folder, or the name of a new file, beside `target`; it takes its place, synced, at the end.

    Files get the permissions that the umask gives; safetensors would let nobody but their owner read them.
    After an error the old one stands, and parents that were made here are gone. What an earlier process left
    when it was killed in here is put right first (`restore`).
    """
    restore(target)
    new, old = temporary_names(target)
    absent_parents = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir() if folder else new.touch()
        permissions = new.stat().st_mode & 0o666
        yield new
        sync_tree(new, permissions)
        if target.is_dir():
            target.rename(old)
        new.rename(target)
        sync(target.parent)
    finally:
        restore(target)
        if not target.exists():
            with suppress(OSError):
                for parent in absent_parents:
                    parent.rmdir()


def restore(target: Path) -> None:
    """Undo a half-done `replacing`: the earlier folder comes back, and what was being made goes."""
    new, old = temporary_names(target)
    if old.exists() and not target.exists():
        old.rename(target)
    if new.is_file():
        new.unlink()
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)


def sync_tree(path: Path, permissions: int | None = None) -> None:
    """Bring a file, or a folder with every file and folder below it, to the disk.

    Args:
        path: of the file or folder.
        permissions: that files get; by default those that the umask gave the folder.
    """
    permissions = path.stat().st_mode & 0o666 if permissions is None else permissions
    for parent, _, files in os.walk(path, topdown=False):
        for name in files:
            _sync_file(Path(parent, name), permissions)
        sync(Path(parent))
    if path.is_file():
        _sync_file(path, permissions)


def _sync_file(path: Path, permissions: int) -> None:
    if not path.is_symlink():
        path.chmod(permissions)
    sync(path)


@contextmanager
def workspace(prefix: str) -> Iterator[Path]:
    """Give an empty temporary folder that goes at the end, and remove those that killed processes left.

    A living process holds a lock on its folder, which goes with the process however it ends.
    """
    parent = Path(tempfile.gettempdir())
    for leftover in parent.glob(f"{prefix}*"):
        with suppress(OSError):  # in use, of another user, or gone by now
            descriptor = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover)
            finally:
                os.close(descriptor)
    new = Path(tempfile.mkdtemp(prefix=".flashkat-"))  # named when it is locked: nobody clears it before
    descriptor = os.open(new, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        folder = new.with_name(new.name.replace(".flashkat-", prefix, 1))
        new.rename(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def temporary_names(target: Path) -> tuple[Path, Path]:
    """Return the hidden names beside `target` of what is being made and of what it replaces."""
    return target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")


def sync(path: Path) -> None:
    """Bring a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
