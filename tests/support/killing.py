"""A script that trains a small run again and again, killed at many points and resumed; see test_resuming.py.

Everything is imported once, and each attempt is a forked child, so that a kill costs about a second.

    python tests/support/killing.py FOLDER KILLS WORKERS

FOLDER/whole is the run that nobody disturbed, FOLDER/killed-1 and so on the others: when one is complete, the
next begins. Prints how many processes were killed, how many of those while a checkpoint or a model was being
written, how often a process found a checkpoint to go on from, and how many runs they made.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import timm.data.mixup
import timm.optim
import timm.scheduler
import timm.utils  # noqa: F401
import torch
from small_runs import make_images, small_run
from transformers.utils import logging

from flashkat_hf.training import train
from flashkat_hf.training.recipe import Settings

with contextlib.suppress(ImportError):
    import matplotlib.figure  # noqa: F401 - here, once, rather than in each child


def settings(folder: Path, name: str, workers: int) -> Settings:
    """Return settings with all that draws random numbers, averaged weights and accumulation."""
    random_parts = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.3}
    others = {"epochs": 3, "micro_batch": 4, "ema_decay": 0.8, "checkpoint_steps": 2, "seed": 3}
    options = {"workers": workers, "resume": True, "compile": False}
    return small_run(folder / "images", folder / name, **random_parts, **others, **options)


def in_child(run: Settings, seconds: float | None = None, writes: int | None = None) -> int:
    """Train in a child and return its exit status.

    Args:
        run: what the child trains.
        seconds: kill it this long after it has completed a checkpoint, however slow the machine is.
        writes: kill it when it syncs its n-th file or folder.
    """
    checkpoints = set(run.output.glob("checkpoints/step-*"))
    child = os.fork()
    if child == 0:
        status = 1
        os.setpgid(0, 0)
        try:
            if writes is not None:
                fsync, remaining = os.fsync, iter(range(writes))

                def counted(descriptor: int) -> None:
                    if next(remaining, None) is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    fsync(descriptor)

                os.fsync = counted
            train(run)
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        while checkpoints.issuperset(run.output.glob("checkpoints/step-*")):
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break  # it has ended, and its checkpoints are gone
            time.sleep(0.005)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # a worker just forked would wait for its parent for ever
    return status


def main(folder: Path, kills: int, workers: int) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    make_images(folder / "images")
    if in_child(settings(folder, "whole", workers=0)) != 0:
        raise SystemExit("the undisturbed run failed")
    draw, killed, during, resumed, runs, attempts, status = random.Random(workers), 0, 0, 0, 1, 0, None
    while killed < kills or status != 0:
        runs += status == 0
        run, attempts = settings(folder, f"killed-{runs}", workers), attempts + 1
        resumed += any((run.output / "checkpoints").glob("step-*"))
        if killed >= kills:
            status = in_child(run)
        elif attempts % 2:
            status = in_child(run, writes=draw.randrange(1, 40))
        else:
            status = in_child(run, seconds=draw.uniform(0, 0.2))
        if status not in (0, -signal.SIGKILL):
            raise SystemExit(f"attempt {attempts} failed with {status}")
        killed += status != 0
        during += status != 0 and attempts % 2
    print(json.dumps({"killed": killed, "during_a_save": during, "resumed": resumed, "runs": runs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
