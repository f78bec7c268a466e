"""The log of a run: its progress, lines of metrics.jsonl, and the same numbers to trackers."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..files import write_text
from .progress import progress_bar
from .recipe import Settings
from .run_folder import RunFolder


class RunLog:
    """The log of a run; only the main process writes and shows something."""

    def __init__(self, accelerator: Accelerator, folder: RunFolder):
        self.accelerator = accelerator
        self.folder = folder
        self.main = accelerator.is_main_process
        self.bar: Any = None  # until `show`

    def begin(self, settings: Settings, checkpoint: Path | None) -> None:
        """Start metrics.jsonl with the lines of a checkpoint, and the trackers with the settings."""
        if self.main:
            lines = (checkpoint / self.folder.metrics.name).read_text() if checkpoint else ""
            write_text(self.folder.metrics, lines)
            values = settings.to_dict().items()
            config = {name: value for name, value in values if isinstance(value, str | int | float)}
            self.accelerator.init_trackers("flashkat", config)

    def show(self, step: int, num_steps: int) -> Any:
        """Return the progress of the run, a context manager."""
        self.bar = progress_bar(num_steps, "step", initial=step, shown=self.main)
        return self.bar

    def say(self, text: str) -> None:
        """Print a line above the progress."""
        if self.main:
            self.bar.clear()
            with suppress(BrokenPipeError):  # of `| head`: training goes on
                print(text, flush=True)
            self.bar.refresh()

    def note(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, and its numbers to the trackers."""
        if self.main:
            with self.folder.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        prefix = "train/" if "kind" in line else "epoch/"
        values = {prefix + name: value for name, value in line.items() if isinstance(value, int | float)}
        self.accelerator.log(values, step=line["step"])
