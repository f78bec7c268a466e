"""Pushing checkpoints while training goes on."""

import os
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from huggingface_hub import HfApi

from ..files import workspace
from ..hub_errors import HubError
from ..messages import one_line, warn
from .destination import Destination
from .staging import stage
from .upload import check_access, send


@dataclass
class _Job:
    folder: Path  # as the caller names it
    snapshot: Path  # what the folder held then
    message: str
    target: Destination
    final: bool
    failures: int = 0

    def discard(self) -> None:
        """Remove the snapshot."""
        if self.snapshot != self.folder:
            shutil.rmtree(self.snapshot, ignore_errors=True)


class BackgroundPusher:
    """Push model folders from a thread, so that training neither waits for the Hub nor ends with it.

    Checkpoints go to a branch, one commit each; the final model goes to main. Only one push runs at a time,
    and of the checkpoints that wait for it only the newest is kept. What fails is tried again, later and
    later; what the Hub refuses for good is said in a warning. Make it in the main process only.

    Args:
        repo_id: `owner/name`; made if it does not exist.
        private: visibility of a new repository.
        branch: for checkpoints; made from main.
        token: by default HF_TOKEN's or the one you logged in with.
        delays: seconds before each further try; the last one is used again and again.

    Raises:
        ValueError: in one line, before training starts: the name, the token, its rights, or no network.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        branch: str = "checkpoints",
        token: str | None = None,
        delays: tuple[float, ...] = (10, 30, 60, 120, 300),
    ):
        self._checkpoint_target = Destination(repo_id, branch, private, token=token)
        self._main_target = Destination(repo_id, private=private, token=token)
        self._delays = delays
        check_access(self._main_target)
        with self._main_target.asking():
            HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True)
        self._checkpoint: _Job | None = None  # the newest that waits
        self._final: _Job | None = None
        self._running: _Job | None = None
        self._problems: list[str] = []
        self._stopping = False  # no more checkpoints come
        self._given_up = False
        self._cleared: set[Path] = set()
        self._changed = threading.Condition()
        self._staging = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="flashkat-push", daemon=True)
        self._thread.start()

    def submit(self, folder: Path, message: str) -> None:
        """Queue a checkpoint to be pushed in its turn, and return at once.

        Args:
            folder: a model folder. It may be replaced or removed right after, but its files must not be
                written to: they are linked, not copied, where the file system can.
            message: the commit's.
        """
        if job := self._job(Path(folder), message, self._checkpoint_target, final=False):
            with self._changed:
                if self._checkpoint:
                    self._checkpoint.discard()
                self._checkpoint = job
                self._changed.notify_all()

    def finish(self, folder: Path | None, message: str, *, patience: float = 600.0) -> list[str]:
        """Push the final model to main, then the last checkpoint that still waits, and end the thread.

        Args:
            folder: a model folder; None where training brought none.
            message: the commit's.
            patience: seconds after which the remaining pushes are given up.

        Returns:
            One line for each thing that was not pushed, with the command that pushes it.
        """
        job = self._job(Path(folder), message, self._main_target, final=True) if folder is not None else None
        with self._changed:
            self._final = job
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(patience)
        with self._staging, self._changed:  # PyTorch in a thread must not live to see the interpreter's end
            self._given_up = True
            pending = [job for job in (self._final, self._running, self._checkpoint) if job]
            for job in sorted(pending, key=lambda job: not job.final):
                self._problems.append(self._problem(job, "the Hub could not be reached in time"))
                if job is not self._running:
                    job.discard()
            self._final = None
            self._checkpoint = None
            self._changed.notify_all()
            return list(dict.fromkeys(self._problems))

    def _job(self, folder: Path, message: str, target: Destination, final: bool) -> _Job | None:
        """Return a job with a snapshot of the folder, or None where that fails."""
        job = _Job(folder, folder, message, target, final)
        try:
            if folder not in self._cleared:
                self._cleared.add(folder)
                for leftover in folder.parent.glob(f".{folder.name}-push-*"):  # of a run that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
            job.snapshot = _link(folder)
        except OSError as error:
            self._refuse(job, one_line(error))
            return None
        return job

    def _work(self) -> None:
        """Push one job after the other until no more come: the thread's function."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._final or self._checkpoint or self._stopping)
                self._running = job = self._final or self._checkpoint
                if job is None:
                    return
                if job.final:
                    self._final = None
                else:
                    self._checkpoint = None
            retry = self._try(job)
            with self._changed:
                self._running = None
                retry = retry and not self._given_up
                if not retry or (not job.final and self._checkpoint):  # done, or a newer one waits
                    job.discard()
                elif job.final:
                    self._final = job
                else:
                    self._checkpoint = job
                if retry:
                    self._wait(self._delays[min(job.failures, len(self._delays)) - 1])

    def _wait(self, seconds: float) -> None:
        """Wait before the next try, but no longer than until there is something new to do."""
        state = (self._stopping, self._given_up, self._checkpoint)
        self._changed.wait_for(
            lambda: (self._stopping, self._given_up, self._checkpoint) != state, timeout=seconds
        )

    def _try(self, job: _Job) -> bool:
        """Push once; return True if it failed in a way that another try may mend."""
        try:
            with workspace("flashkat-push-") as staging:
                with self._staging:
                    if self._given_up:
                        return False
                    staged = stage(
                        job.snapshot,
                        staging,
                        repo_id=job.target.repo_id,
                        final=job.final,
                        token=job.target.token,
                    )
                send(staged, job.target, job.message)
        except Exception as error:
            reason = (
                str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {one_line(error)}"
            )
            reason = reason.replace(str(job.snapshot), str(job.folder))
            if isinstance(error, HubError) and (error.transient or error.moved):
                job.failures += 1
                warn(f"{job.folder} is not pushed yet: {reason}; it will be tried again")
                return True
            self._refuse(job, reason)
        return False

    def _refuse(self, job: _Job, reason: str) -> None:
        """Warn of what was not pushed, and keep the line for the end."""
        line = self._problem(job, reason)
        self._problems.append(line)
        warn(line)

    def _problem(self, job: _Job, reason: str) -> str:
        """Return the line that says what was not pushed, why, and the command that pushes it."""
        revision = "" if job.target.branch == "main" else f" --revision {job.target.branch}"
        command = f"flashkat push {quote(str(job.folder))} {job.target.repo_id}{revision}"
        return f"{job.folder} ({job.message}) was not pushed: {reason}; `{command}` pushes it"


def _link(folder: Path) -> Path:
    """Make a folder beside this one with hard links to its files, or copies where links are impossible."""
    snapshot = Path(tempfile.mkdtemp(prefix=f".{folder.name}-push-", dir=folder.resolve().parent))
    try:
        for path in folder.iterdir():
            if path.is_file():
                try:
                    os.link(path.resolve(), snapshot / path.name)
                except OSError:
                    shutil.copyfile(path, snapshot / path.name)
    except OSError:
        shutil.rmtree(snapshot, ignore_errors=True)
        raise
    return snapshot
