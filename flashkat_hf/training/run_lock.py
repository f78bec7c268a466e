"""The lock of a run's folder: one process of one machine writes into it, and a dead one does not hold it."""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from ..messages import warn

NAME = ".lock"
BEAT = 5.0  # seconds between signs of life
PATIENCE = 30.0  # seconds without one after which a process of another machine counts as dead


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is missing, and goes again if nothing comes into it.

    The lock is a file that names host, process and its start. It needs no locks of the file system, only that
    a link, or else a file, is made by one process, as on NFS. On this machine a holder that has ended is
    known at once. The holder changes the file every few seconds: one of another machine is watched.

    Raises:
        ValueError: another process holds it; the message names process, machine and start.
    """
    absent = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock, ended = folder / NAME, threading.Event()
    own = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "start": _start(os.getpid()),
        "id": uuid.uuid4().hex,
    }
    try:
        _take(lock, own)
        beating = threading.Thread(target=_beat, args=(lock, ended), name="lock", daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            if _read(lock) == own:
                lock.unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            for path in absent:
                path.rmdir()


def _take(lock: Path, own: dict[str, Any]) -> None:
    """Make a lock, or replace the one of a dead holder, whose one successor holds a lock named after it."""
    new = lock.with_name(f"{lock.name}.{own['id']}")
    new.write_text(json.dumps(own))
    try:
        while not _made(lock, new):
            holder = _read(lock)
            if _lives(lock, holder):
                raise ValueError(
                    f"--output: {lock.parent} is being written by {_named(holder)}; name another"
                )
            succession = lock.with_name(f"{lock.name}.after-{holder.get('id', '')}")
            _take(succession, own)
            try:
                if lock.exists() and _read(lock) == holder:  # nobody else may change it now
                    os.replace(new, lock)
                    return
            finally:
                succession.unlink()
    finally:
        new.unlink(missing_ok=True)


def _made(lock: Path, new: Path) -> bool:
    """Return True if the lock was not there and is now what `new` is."""
    try:
        os.link(new, lock)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        with suppress(FileExistsError), lock.open("x") as file:
            file.write(new.read_text())
            return True
        return False
    return True


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["start"]))
    return f"process {holder['process']} on {holder['host']}, which started at {since}"


def _read(lock: Path) -> dict[str, Any]:
    """Return what a lock says of its holder; nothing where there is none, or it is no lock."""
    try:
        holder = json.loads(lock.read_text())
        return holder if {"host", "process", "start"} <= holder.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _lives(lock: Path, holder: dict[str, Any]) -> bool:
    """Return whether the holder of a lock lives; watch the lock if this machine does not know."""
    if holder and holder["host"] == socket.gethostname():
        start = _start(holder["process"])
        if start is None or abs(start - holder["start"]) <= 1:
            return start is not None
    before, end = _changed(lock), time.monotonic() + PATIENCE
    if before is not None:
        warn(f"{lock} is of {_named(holder)}; it is watched for {PATIENCE:g} s")
    while (now := _changed(lock)) == before and now is not None and time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
    return now is not None and now != before


def _changed(lock: Path) -> int | None:
    """Return when a lock was changed last; it is opened, since NFS asks its server then."""
    try:
        with lock.open() as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _start(process: int) -> int | None:
    """Return when a process of this machine was started, in seconds since 1970; None if there is none."""
    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else round(found.create_time())
    except psutil.Error:
        return None


def _beat(lock: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(lock)
