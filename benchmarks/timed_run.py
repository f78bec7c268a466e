"""Train as examples/finetune.py does, and say when update 10 was made; bench_runs.py starts it.

    python benchmarks/timed_run.py '{"flags": ["--output", "runs/x"], "synthetic": false, "started": 1.7e9}'

`started` is the time (seconds since 1970) before the process began, whose imports count. With `synthetic`
every batch is the same and on the device already.
"""

import json
import sys
import time
from collections.abc import Callable

import torch

from flashkat_hf.training import feed, train
from flashkat_hf.training.recipe import parse
from flashkat_hf.training.trainer import Trainer

UPDATE = 10


def after_update(number: int, act: Callable[[Trainer], None]) -> None:
    """Let `act` take the trainer of this process after an update, when the device has done it."""
    update = Trainer._update

    def watched(trainer: Trainer, batches) -> None:
        update(trainer, batches)
        if trainer.progress.step == number:
            if trainer.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            act(trainer)

    Trainer._update = watched


def main(given: dict) -> None:
    if given["synthetic"]:
        from bench_training import Synthetic

        Synthetic.steps, feed.TrainBatches = 40, Synthetic
    after_update(
        UPDATE, lambda _: print(f"update reached after {time.time() - given['started']} s", flush=True)
    )
    train(parse(given["flags"]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
