"""Train as `flashkat finetune` does, and print the seconds that each part of the start took, to update 10.

    python benchmarks/timed_run.py '{"flags": ["--output", "runs/x"], "synthetic": false, "started": 1.7e9}'

bench_runs.py starts it so. `started` is the time (seconds since 1970) before the process began: "settings" is
Python's own start and the reading of the flags, "imports" PyTorch, transformers and what else a run needs.
With `synthetic` every batch is the same and on the device already. After `start` the line is JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashkat_hf.cli import main
from flashkat_hf.training import start

if TYPE_CHECKING:
    from flashkat_hf.training.trainer import Trainer

UPDATE = 10


class Start:
    """The seconds of each part of a start, in order, and how they are found."""

    def __init__(self, began: float):
        self.seconds: dict[str, float] = {}
        self.last = began

    def end(self, part: str) -> None:
        """Note that a part ends now."""
        now = time.time()
        self.seconds[part] = round(now - self.last, 2)
        self.last = now

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Let a part end when a function does, at its first call."""
        function = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            if part not in self.seconds:
                self.end(part)
            return result

        setattr(owner, name, watched)

    def watch_run(self) -> None:
        """Watch what follows the imports."""
        from flashkat_hf.training import run
        from flashkat_hf.training.feed import Feed
        from flashkat_hf.training.task import ImageClassification

        self.watch(run, "make_accelerator", "device")
        self.watch(ImageClassification, "open_data", "data")
        self.watch(run, "build_model", "model")
        self.watch(run, "PreparedModel", "optimizer")
        self.watch(Feed, "loading_rate", "first batches")
        after_update(1, lambda _: self.end("update 1"))
        after_update(UPDATE, self._finish)

    def _finish(self, trainer: "Trainer") -> None:
        self.end(f"update {UPDATE}")
        print("start", json.dumps(self.seconds), flush=True)


def after_update(number: int, act: "Callable[[Trainer], None]") -> None:
    """Let `act` take the trainer of this process after an update, when the device has done it."""
    import torch

    from flashkat_hf.training.trainer import Trainer

    update = Trainer._update

    def watched(trainer: Trainer, batches) -> None:
        update(trainer, batches)
        if trainer.progress.step == number:
            if trainer.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            act(trainer)

    Trainer._update = watched


def timed(given: dict) -> int:
    """Run the command; return its exit code."""
    parts, import_train = Start(given["started"]), start.import_train

    def watched() -> Callable:
        parts.end("settings")
        train = import_train()
        parts.end("imports")
        parts.watch_run()
        if given["synthetic"]:
            from bench_training import Synthetic

            from flashkat_hf.training import feed

            Synthetic.steps, feed.TrainBatches = 40, Synthetic
        return train

    start.import_train = watched
    return main(["finetune", *given["flags"]])


if __name__ == "__main__":
    sys.exit(timed(json.loads(sys.argv[1])))
