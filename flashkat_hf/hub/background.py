"""Pushing checkpoints while training goes on."""

import logging
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from huggingface_hub import HfApi, get_token

from ..checkpoints.hub_errors import HubError, explained
from .staging import stage
from .upload import check_access, check_branch, check_name, send

logger = logging.getLogger(__name__)


@dataclass
class _Job:
    folder: Path  # as the caller names it
    snapshot: Path  # what the folder held then
    message: str
    branch: str
    final: bool
    failures: int = 0


class BackgroundPusher:
    """Pushes model folders from a thread of its own, so that training neither waits for the Hub nor ends with it.

    Checkpoints go to a branch, one commit each; the final model goes to main. Only one push runs at a time,
    and of the checkpoints that wait for it only the newest is kept. What fails is tried again, later and
    later; what the Hub refuses for good is logged as a warning. Make it in the main process only.

    Args:
        repo_id: `owner/name`; made if it does not exist.
        private: of a new repository.
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
        self.repo_id, self.branch = check_name(repo_id), check_branch(branch)
        self._token, self._delays = token, delays
        check_access(repo_id, private=private, token=token)
        with explained(f"cannot push to {repo_id}", repo_id, token):
            HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True)
        self._waiting: _Job | None = None  # the newest checkpoint
        self._last: _Job | None = None  # the final model
        self._running: _Job | None = None
        self._refused: list[str] = []
        self._stopping = self._given_up = False
        self._cleared: set[Path] = set()
        self._changed, self._staging = threading.Condition(), threading.Lock()
        self._thread = threading.Thread(target=self._work, name="flashkat-push", daemon=True)
        self._thread.start()

    def submit(self, folder: Path, message: str) -> None:
        """Push a checkpoint when its turn comes; returns at once.

        Args:
            folder: a model folder. It may be replaced or removed right after, but its files must not be
                written to: they are linked, not copied, where the file system can.
            message: of the commit.
        """
        job = self._job(Path(folder), message, self.branch, final=False)
        if job:
            with self._changed:
                _discard(self._waiting)
                self._waiting = job
                self._changed.notify_all()

    def finish(self, folder: Path | None, message: str, *, patience: float = 600.0) -> list[str]:
        """Push the final model to main, then the last checkpoint that still waits, and end the thread.

        Args:
            folder: a model folder; None where training brought none.
            message: of the commit.
            patience: seconds after which the rest is given up.

        Returns:
            One line for each thing that was not pushed, with the command that pushes it.
        """
        job = self._job(Path(folder), message, "main", final=True) if folder is not None else None
        with self._changed:
            self._last, self._stopping = job, True
            self._changed.notify_all()
        self._thread.join(patience)
        with self._staging, self._changed:  # PyTorch in a thread must not live to see the interpreter's end
            jobs = (self._last, self._running, self._waiting)
            left = sorted((job for job in jobs if job), key=lambda job: not job.final)
            self._waiting, self._last, self._given_up = None, None, True
            lines = self._refused + [self._line(job, "the Hub could not be reached in time") for job in left]
            for job in left:
                if job is not self._running:
                    _discard(job)
            self._changed.notify_all()
        return list(dict.fromkeys(lines))

    def _job(self, folder: Path, message: str, branch: str, final: bool) -> _Job | None:
        try:
            if folder not in self._cleared:  # what a run that was killed has left
                self._cleared.add(folder)
                for left in folder.parent.glob(f".{folder.name}-push-*"):
                    shutil.rmtree(left, ignore_errors=True)
            snapshot = _link(folder)
        except OSError as error:
            job = _Job(folder, folder, message, branch, final)
            self._refuse(job, error.strerror or str(error))
            return None
        return _Job(folder, snapshot, message, branch, final)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._last or self._waiting or self._stopping)
                self._running = job = self._last or self._waiting
                if job is None:
                    return
                if job is self._last:
                    self._last = None
                else:
                    self._waiting = None
            again = self._try(job)
            with self._changed:
                self._running = None
                if (
                    not again or self._given_up or (not job.final and self._waiting)
                ):  # done, or a newer one waits
                    _discard(job)
                elif job.final:
                    self._last = job
                else:
                    self._waiting = job
                if again and not self._given_up:
                    before = (self._stopping, self._given_up, self._waiting)
                    self._changed.wait_for(
                        lambda: (self._stopping, self._given_up, self._waiting) != before,  # noqa: B023 - used here
                        self._delays[min(job.failures, len(self._delays)) - 1],
                    )

    def _try(self, job: _Job) -> bool:
        """One push; whether it is worth another try."""
        try:
            with tempfile.TemporaryDirectory(prefix="flashkat-push-") as workspace:
                with self._staging:
                    if self._given_up:
                        return False
                    staged = stage(
                        job.snapshot,
                        Path(workspace),
                        repo_id=self.repo_id,
                        final=job.final,
                        secrets=[self._token or get_token() or ""],
                    )
                send(staged, self.repo_id, job.branch, token=self._token, message=job.message)
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            if isinstance(error, HubError) and (error.transient or error.moved):
                job.failures += 1
                logger.warning("%s is not pushed yet: %s; it will be tried again", job.folder, reason)
                return True
            self._refuse(job, reason)
        return False

    def _refuse(self, job: _Job, reason: str) -> None:
        line = self._line(job, reason.replace(str(job.snapshot), str(job.folder)))
        logger.warning("%s", line)
        self._refused.append(line)

    def _line(self, job: _Job, reason: str) -> str:
        where = "" if job.branch == "main" else f" --revision {job.branch}"
        command = f"flashkat push {quote(str(job.folder))} {self.repo_id}{where}"
        return f"{job.folder} ({job.message}) was not pushed: {reason}; `{command}` pushes it"


def _link(folder: Path) -> Path:
    """A folder beside this one with hard links to its files, or copies where that cannot be."""
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


def _discard(job: _Job | None) -> None:
    if job and job.snapshot != job.folder:
        shutil.rmtree(job.snapshot, ignore_errors=True)
