"""The batches of a run: from its data to the device of a process."""

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from ..data.batches import EpochOrder, EvalBatches, TrainBatches
from ..data.gpu.shifting import Shifting
from ..data.held import HeldBatches
from ..data.prefetch import made_ahead, moved
from ..data.samples import ImageData
from .plan import Plan
from .speed import loading_rate
from .task import Task

KEPT_BYTES = 2**30  # of batches that are read before training, to measure how fast that is


class Feed:
    """The batches of one process: `train` to learn from, `val` and `test` for `evaluate`.

    An epoch is chosen on `val`; where there are no images for that alone, it is `test`.
    """

    def __init__(self, plan: Plan, accelerator: Accelerator, data: ImageData, processor: Any, task: Task):
        settings = plan.settings
        options = {
            "batch_size": plan.micro_batch,
            "rank": accelerator.process_index,
            "world_size": accelerator.num_processes,
            "pin_memory": accelerator.device.type == "cuda",
        }
        transform, test_transform, remainder = task.transforms(processor, settings.augmentation)
        order = {"epochs": settings.epochs, "seed": settings.seed}
        readers = 0 if settings.in_memory else plan.workers
        self.plan = plan
        self.device = accelerator.device
        self.train: TrainBatches | HeldBatches
        if isinstance(remainder, Shifting):
            held = {name: value for name, value in options.items() if name != "pin_memory"}
            held |= {"seed": settings.seed, "workers": readers}
            self.train = HeldBatches(data.train, transform, remainder.to(self.device), **held)
            remainder = None
        else:
            self.train = TrainBatches(data.train, transform, workers=plan.workers, **order, **options)
        options |= {"workers": readers}
        self.test = EvalBatches(data.test, test_transform, keep=data.val is None, **options)
        self.val = self.test
        if data.val is not None:
            self.val = EvalBatches(data.val, test_transform, keep=True, **options)
        self.to_device = remainder.to(self.device) if remainder else partial(moved, self.device)
        # Without workers, batches draw from the generators of this process, and so does the step.
        self.in_background = remainder is not None and self.device.type == "cuda" and plan.workers > 0
        self.size = (processor.crop_size["height"], processor.crop_size["width"])
        self.begun: tuple[tuple[int, int], Generator[dict[str, Tensor], None, None]] | None = None
        self.updates_per_epoch = len(self.train) // plan.accumulate

    def set_epochs(self, epochs: int) -> None:
        """Say how many epochs the run has, where the settings left it open: workers read ahead."""
        if isinstance(self.train, TrainBatches) and isinstance(self.train.position, EpochOrder):
            self.train.position.epochs = epochs

    def epoch(self, epoch: int, update: int) -> Generator[dict[str, Tensor], None, None]:
        """Return the micro-batches of an epoch from an update on, on the device; close what is left early."""
        if self.begun and self.begun[0] == (epoch, update):
            batches, self.begun = self.begun[1], None
            return batches
        batches = self.train.epoch(epoch, update * self.plan.accumulate)
        decode = getattr(self.to_device, "decode", None)
        return made_ahead(batches, self.to_device, self.device, self.in_background, decode)

    def hold(self, stop: Callable[[], int]) -> bool:
        """Read the images that lie on the device, and tell whether there are such; `stop` ends it early."""
        if not isinstance(self.train, HeldBatches):
            return False
        self.train.read(stop)
        return True

    def loading_rate(self, epoch: int, update: int, stop: Callable[[], int]) -> float | None:
        """Return the images per second that workers give while nothing trains, if it is soon known.

        The batches are kept, on the CPU, for the `epoch` that follows; `stop` ends it early. It is not
        measured where two batches of each worker are more than KEPT_BYTES.
        """
        if not self.plan.workers or isinstance(self.train, HeldBatches):
            return None
        batches, kept = self.epoch(epoch, update), []

        def noted() -> Iterator[dict[str, Tensor]]:
            for batch in batches:
                kept.append({name: tensor.cpu() for name, tensor in batch.items()})
                number = max(len(kept), 2 * self.plan.workers)
                if stop() or number * sum(tensor.nbytes for tensor in batch.values()) > KEPT_BYTES:
                    return
                yield batch

        rate = loading_rate(noted(), self.plan.workers)
        self.begun = (epoch, update), self._after(kept, batches)
        return rate

    def _after(self, kept: list, batches: Generator) -> Generator[dict[str, Tensor], None, None]:
        with closing(batches):
            while kept:
                yield moved(self.device, kept.pop(0))
            yield from batches

    def close(self) -> None:
        """End the worker processes."""
        for batches in (self.train, self.val, self.test):
            batches.close()

    def unreadable(self) -> list[str]:
        """Return the names of the images that this process has left out, less the folder of the data."""
        root = f"{self.plan.settings.data}{os.sep}"  # which may be another one when the run goes on
        names = {**self.train.corrupt, **self.val.corrupt, **self.test.corrupt}
        return [name.removeprefix(root) for name in names]
