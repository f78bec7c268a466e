"""Where a run stands, and folders that are complete on disk or not there: checkpoints and models."""

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

from ..files import sync, sync_tree, temporary_names


@dataclass
class Progress:
    """Where a run stands, all that is not weights or optimiser; random numbers follow from the step.

    Attributes:
        epoch: epochs that are complete, or the index of the running one.
        update: updates made in the running epoch.
        step: updates made in all.
        losses: finite ones in the running epoch.
        loss_sum: of these.
        skipped: updates left out because they were not finite.
        unreadable: names of the images left out, of all processes, as of the last complete epoch.
        best: metrics of the best epoch so far.
        last: metrics of the last epoch that was evaluated.
        seconds: spent so far.
        peak_memory: of the device, in bytes.
    """

    epoch: int = 0
    update: int = 0
    step: int = 0
    losses: int = 0
    loss_sum: float = 0.0
    skipped: int = 0
    unreadable: list[str] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory: int = 0


class Checkpoints:
    """The checkpoints of a run, `folder/step-N`; whatever has that name is complete.

    Args:
        folder: where they are.
        keep: how many; older ones go when a new one is complete.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def complete(self) -> list[Path]:
        """The complete ones, oldest first."""
        found = [path for path in self.folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def newest(self) -> Path | None:
        return (self.complete() or [None])[-1]

    def save(
        self, accelerator: Accelerator, progress: Progress, agree: Callable[[int], int], *files: Path
    ) -> Path:
        """Write model, optimiser, registered objects, progress and copies of `files`; all processes together.

        Args:
            accelerator: saves the states that it has prepared and registered.
            progress: where the run stands.
            agree: the largest of an integer over all processes.
            files: small files of the main process, to be found again as they are now.

        Raises:
            OSError: something could not be written; earlier checkpoints are as they were.
        """
        target = self.folder / f"step-{progress.step}"
        if target.exists():
            return target
        new, _ = temporary_names(target)
        main = accelerator.is_main_process

        def prepare() -> None:
            for left in self.folder.glob(".step-*"):  # of a process that was killed
                shutil.rmtree(left)
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
            for action, everywhere in ((prepare, False), (write, True), (complete, False)):
                _together(action if main or everywhere else lambda: None, agree)
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
            progress = Progress(**json.loads((path / "progress.json").read_text()))
            accelerator.load_state(str(path))
        except Exception as error:
            raise ValueError(f"cannot read the checkpoint {path}: {' '.join(str(error).split())}") from error
        return progress

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _prune(self) -> None:
        for path in self.complete()[: -self.keep]:
            hidden = path.with_name(f".{path.name}")  # half removed, it must not look complete
            path.rename(hidden)
            shutil.rmtree(hidden)


@contextmanager
def os_errors() -> Iterator[None]:
    """What PyTorch and safetensors say when they cannot write becomes the OSError that it is."""
    try:
        yield
    except (RuntimeError, SafetensorError, CheckpointException) as error:
        raise _as_os_error(error) from error


def _together(action: Callable[[], None], agree: Callable[[int], int]) -> None:
    """Do something that writes, each process its own; OSError in all of them if one cannot."""
    problem = None
    try:
        with os_errors():
            action()
    except OSError as error:
        problem = error
    if agree(int(problem is not None)):
        raise problem or OSError("another process could not write its part")


def _as_os_error(error: BaseException) -> OSError:
    """What PyTorch and safetensors say when they cannot write, as the error of the system that it is."""
    if isinstance(error, CheckpointException):
        return _as_os_error(next(iter(error.failures.values()))[0])
    if isinstance(error, OSError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, SafetensorError) or "inline_container" in text or "StreamWriter" in text:
        number = next((n for n in (errno.ENOSPC, errno.EDQUOT, errno.EIO) if os.strerror(n) in text), None)
        return (
            OSError(number, os.strerror(number)) if number else OSError(f"perhaps the disk is full ({text})")
        )
    raise error


def all_finite(module: torch.nn.Module) -> bool:
    """Whether every parameter is finite; of sharded ones, this process's part."""
    parts = (getattr(parameter, "_local_tensor", parameter).detach() for parameter in module.parameters())
    return bool(torch.stack([part.isfinite().all() for part in parts]).all())
