"""Which folder a run may have as its output: known before PyTorch is imported, asked again under the lock."""

import os
import re
from pathlib import Path

from ..files import check_utf8
from .recipe import Settings
from .run_lock import NAME as LOCK

FILES = ("settings.json", "metrics.jsonl", "summary.json", "curves.png", "functions.png", "functions.gif")
CONTENTS = frozenset({*FILES, "functions.jsonl", "best", "last", "samples", "checkpoints", "logs"})
SCHEDULER_LOG = re.compile(r"\.(out|err|log|[oe]\d+)$")  # slurm-12.out, job.o12, nohup.out


def check_place(path: Path) -> None:
    """Refuse a path where no folder can be, or none that can be written to.

    Raises:
        ValueError: in one line.
    """
    check_utf8(str(path), "--output")
    if os.path.lexists(path):
        if not path.is_dir():
            raise ValueError(f"--output: {path} exists and is not a folder; name another")
        if not os.access(path, os.W_OK | os.X_OK):
            raise ValueError(f"--output: {path} cannot be written to")
        return
    home = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not (home.is_dir() and os.access(home, os.W_OK | os.X_OK)):
        problem = f"cannot be made, {home} is not a folder that can be written to"
        raise ValueError(f"--output: {path} {problem}")


def check_contents(settings: Settings) -> None:
    """Refuse a folder that holds what the run may neither go on with nor overwrite.

    Raises:
        ValueError: in one line.
    """
    path = settings.output
    names = {child.name for child in path.iterdir() if not child.name.startswith(LOCK)}
    logs = {name for name in names if SCHEDULER_LOG.search(name)}
    if not names or (settings.resume and names == logs):
        return
    if not settings.resume and not settings.overwrite:
        raise ValueError(
            f"--output: {path} exists; --resume goes on with it, --overwrite replaces it, or name another"
        )
    if "settings.json" not in names:
        raise ValueError(f"--output: {path} exists and holds no run of this script; name another")
    others = sorted(name for name in names - CONTENTS if not name.startswith("."))
    if settings.overwrite and others:
        also = f"also holds what others wrote: {', '.join(others)}; move it or name another"
        raise ValueError(f"--output: {path} {also}")
