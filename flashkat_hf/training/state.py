"""The state of a run: its progress, and checkpoints that are complete on disk or not there."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from ..files import read_json, sync, sync_tree, temporary_names
from ..messages import one_line


@dataclass
class Progress:
    """The progress of a run: all that is not weights or optimiser; random numbers follow from the step."""

    epoch: int = 0  # number of complete epochs, which is the index of the running one
    update: int = 0  # number of updates in the running epoch
    step: int = 0  # number of updates in all
    losses: int = 0  # number of finite losses in the running epoch
    loss_sum: float = 0.0  # their sum
    skipped: int = 0  # number of updates left out because they were not finite
    unreadable: list[str] = field(default_factory=list)  # names of all processes' images that were left out
    best: dict[str, Any] = field(default_factory=dict)  # metrics of the best epoch so far
    last: dict[str, Any] = field(default_factory=dict)  # metrics of the last epoch that was evaluated
    seconds: float = 0.0  # time spent so far
    peak_memory: int = 0  # largest memory of the device so far, in bytes


@dataclass
class Checkpoints:
    """The checkpoints of a run, `folder/step-N`; whatever has that name is complete."""

    folder: Path
    keep: int  # so many; older ones go when a new one is complete

    def complete(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        steps = {path: path.name.removeprefix("step-") for path in self.folder.glob("step-*")}
        return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]))

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        return (self.complete() or [None])[-1]

    def save(
        self, accelerator: Accelerator, progress: Progress, agree: Callable[[int], int], *files: Path
    ) -> Path:
        """Write model, optimiser, registered objects, progress and copies of `files`; all processes together.

        Args:
            accelerator: saves the states that it has prepared and registered.
            progress: where the run stands.
            agree: returns the largest of an integer over all processes.
            files: small files of the main process, kept as they are now.

        Raises:
            OSError: something could not be written; earlier checkpoints are as they were.
        """
        target = self.folder / f"step-{progress.step}"
        if target.exists():
            return target
        new, _ = temporary_names(target)
        main = accelerator.is_main_process

        def prepare() -> None:
            for remains in self.folder.glob(".step-*"):  # of a process that was killed
                shutil.rmtree(remains)
            new.mkdir(parents=True)

        def write() -> None:
            accelerator.save_state(str(new))
            if main:
                for file in files:
                    shutil.copy(file, new / file.name)
                (new / "progress.json").write_text(json.dumps(asdict(progress)))

        def complete() -> None:
            sync_tree(new)
            new.rename(target)
            sync(self.folder)
            self._prune()

        try:
            for action, takes_part in ((prepare, main), (write, True), (complete, main)):
                _together(action if takes_part else lambda: None, agree)
        except OSError:
            if main:
                shutil.rmtree(new, ignore_errors=True)
            raise
        return target

    def load(self, accelerator: Accelerator, path: Path) -> Progress:
        """Put the states back that `save` wrote, in all processes.

        Raises:
            ValueError: in one line, the checkpoint cannot be read or is of another run.
        """
        try:
            progress = Progress(**read_json(path / "progress.json"))
            accelerator.load_state(str(path))
        except Exception as error:
            raise ValueError(f"cannot read the checkpoint {path}: {one_line(error)}") from error
        return progress

    def remove(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _prune(self) -> None:
        for path in self.complete()[: -self.keep]:
            hidden = path.with_name(f".{path.name}")  # half removed, it must not look complete
            path.rename(hidden)
            shutil.rmtree(hidden)


@contextmanager
def os_errors() -> Iterator[None]:
    """Raise the OSError that it is where PyTorch or safetensors cannot write."""
    try:
        yield
    except (RuntimeError, SafetensorError, CheckpointException) as error:
        failures = error.failures.values() if isinstance(error, CheckpointException) else ()
        cause = next((failure[0] for failure in failures), error)
        text = one_line(cause, longest=10_000)
        written = isinstance(cause, SafetensorError) or "inline_container" in text or "StreamWriter" in text
        if isinstance(cause, OSError) or not written:
            raise cause  # noqa: B904 - the error itself, or one within it
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            if os.strerror(number) in text:
                raise OSError(number, os.strerror(number)) from error
        raise OSError(f"perhaps the disk is full ({text})") from error


def _together(action: Callable[[], None], agree: Callable[[int], int]) -> None:
    """Write something in each process; raise OSError in all of them if one cannot."""
    problem = None
    try:
        with os_errors():
            action()
    except OSError as error:
        problem = error
    if agree(int(problem is not None)):
        raise problem or OSError("another process could not write its part")


def all_finite(module: torch.nn.Module) -> bool:
    """Return True if every parameter is finite; of sharded ones, this process's part is asked."""
    parts = (getattr(parameter, "_local_tensor", parameter).detach() for parameter in module.parameters())
    return bool(torch.stack([part.isfinite().all() for part in parts]).all())
