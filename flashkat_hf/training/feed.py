"""The batches of a run: from its data to the device of a process."""

from collections.abc import Generator
from contextlib import closing
from functools import partial
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from ..data.augmentation import batch_transform, evaluation_transform, training_transform
from ..data.batches import EvalBatches, TrainBatches
from ..data.prefetch import made_ahead, moved
from ..data.samples import ImageData
from .plan import Plan
from .speed import loading_rate


class Feed:
    """The batches of one process: `train` to learn from, `test` for `evaluate`."""

    def __init__(self, plan: Plan, accelerator: Accelerator, data: ImageData, processor: Any):
        settings = plan.settings
        options = {
            "batch_size": plan.micro_batch,
            "rank": accelerator.process_index,
            "world_size": accelerator.num_processes,
            "pin_memory": accelerator.device.type == "cuda",
        }
        transform = training_transform(processor, settings.augmentation)
        order = {"epochs": settings.epochs, "seed": settings.seed}
        test_workers = 0 if settings.in_memory else plan.workers
        remainder = batch_transform(processor, settings.augmentation)
        self.plan = plan
        self.device = accelerator.device
        self.train = TrainBatches(data.train, transform, workers=plan.workers, **order, **options)
        self.test = EvalBatches(data.test, evaluation_transform(processor), workers=test_workers, **options)
        self.to_device = remainder.to(self.device) if remainder else partial(moved, self.device)
        # Without workers, batches draw from the generators of this process, and so does the step.
        self.in_background = remainder is not None and self.device.type == "cuda" and plan.workers > 0
        self.updates_per_epoch = len(self.train) // plan.accumulate

    def epoch(self, epoch: int, update: int) -> Generator[dict[str, Tensor], None, None]:
        """Return the micro-batches of an epoch from an update on, on the device; close what is left early."""
        batches = self.train.epoch(epoch, update * self.plan.accumulate)
        decode = getattr(self.to_device, "decode", None)
        return made_ahead(batches, self.to_device, self.device, self.in_background, decode)

    def loading_rate(self, epoch: int, update: int) -> float | None:
        """Return the images per second that workers give while nothing trains; None without workers."""
        if not self.plan.workers:
            return None
        with closing(self.epoch(epoch, update)) as batches:
            return loading_rate(batches, self.plan.workers)

    def unreadable(self) -> list[str]:
        """Return the names of the images that this process has left out so far."""
        return [*self.train.corrupt, *self.test.corrupt]
