"""The progress of a run or an evaluation: tqdm's bar on a terminal, a line a minute elsewhere."""

import sys
import time
from typing import Any

from ..messages import extra, warn

SECONDS = 60.0  # between lines


def progress_bar(
    total: int | None, unit: str, *, text: str = "", initial: int = 0, shown: bool = True, keep: bool = True
) -> Any:
    """Return a bar, a context manager with the methods of `Lines`.

    Args:
        total: steps in all; None where nobody knows.
        unit: name of a step.
        text: what is done.
        initial: steps that were done before.
        shown: False for processes that say nothing.
        keep: whether the bar stays on the terminal when all is done.
    """
    if shown and not sys.stderr.isatty():
        return Lines(total, unit, text, initial)
    tqdm = extra("tqdm").tqdm
    options = {"initial": initial, "dynamic_ncols": True, "disable": not shown, "leave": keep}
    return tqdm(total=total, unit=unit, desc=text or None, **options)


class Lines:
    """The progress as lines on the standard error, for a log file: one a minute, none in the first."""

    def __init__(self, total: int | None, unit: str, text: str = "", initial: int = 0):
        self.total = total
        self.unit = unit
        self.text = text
        self.initial = initial
        self.done = initial
        self.postfix = ""
        self.start = self.shown_at = time.monotonic()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, steps: int = 1) -> None:
        """Count steps, and write a line if the last one is a minute old."""
        self.done += steps
        if (now := time.monotonic()) - self.shown_at >= SECONDS:
            self.shown_at = now
            meter = extra("tqdm").tqdm.format_meter
            rest = {"prefix": self.text, "unit": self.unit, "initial": self.initial, "postfix": self.postfix}
            warn(meter(self.done, self.total, now - self.start, ncols=0, **rest).strip())

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Set what the next line says beside the steps; as tqdm's."""
        self.postfix = text

    def clear(self) -> None:
        """Do nothing: a line stays; as tqdm's."""

    def refresh(self) -> None:
        """Do nothing: a line stays; as tqdm's."""

    def close(self) -> None:
        """Do nothing: a line stays; as tqdm's."""
