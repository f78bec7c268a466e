"""`--time`: how many epochs fit, by the speed of updates that change no weight."""

import time
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

import torch

from .defaults import evaluations_apart
from .evaluation import measure
from .optimization import seed_update

if TYPE_CHECKING:
    from .trainer import Trainer

UNCOUNTED = 3  # first updates: kernels are compiled, graphs captured, workers still starting
FEWEST = 5  # updates that are measured
PART, SHORTEST, LONGEST = 0.03, 1.0, 20.0  # of the time, in seconds, for these updates
SPENT = 0.95  # part of the time that the plan fills: the rest is for saving and for what else may come


def epochs_within(trainer: "Trainer", seconds: float, started: float) -> int:
    """Return how many epochs fit into a time, evaluations and what has passed included; all processes agree.

    The updates that are measured have a learning rate of 0, and the optimiser forgets them: the run that
    follows is to the bit the one that `--epochs` gives.

    Args:
        trainer: a run that has not begun.
        seconds: the time.
        started: when it began, by `time.monotonic`.

    Raises:
        ValueError: not one epoch fits; in one line.
    """
    update, (fixed, image, kept) = _update_seconds(trainer, seconds), _evaluation_seconds(trainer)
    data, processes = trainer.data, trainer.plan.num_processes
    chosen_on, test = (split.num_images or 0 for split in (data.val or data.test, data.test))
    epoch = update * trainer.feed.updates_per_epoch
    first, last = (fixed + image * count / processes for count in (chosen_on, test))
    later = first if kept is None else kept * chosen_on / processes
    every_epoch, at_the_end = trainer.selection.every_epoch, trainer.selection.tests_at_the_end
    before = time.monotonic() - started + last * at_the_end + (first - later) * every_epoch
    milliseconds = [round(1e3 * value) for value in (before, epoch, later * every_epoch)]
    before, epoch, evaluation = (value / 1e3 for value in trainer.agreement.largest(*milliseconds))
    left = SPENT * seconds - before
    every = trainer.settings.evaluate_epochs
    epochs = 0
    while (epochs + 1) * epoch + evaluation * _evaluations(epochs + 1, every) <= left:
        epochs += 1
    if not epochs:
        needed = (before + epoch + evaluation) / SPENT
        raise ValueError(
            f"--time: {trainer.settings.time} is shorter than one epoch, for which the run needs about "
            f"{needed:.0f} s; give more, or a smaller model"
        )
    return epochs


def _evaluations(epochs: int, every: int | None) -> int:
    return -(-epochs // (every or evaluations_apart(epochs)))


def _update_seconds(trainer: "Trainer", seconds: float) -> float:
    """Return the seconds of an update, reading included."""
    model, plan = trainer.model, trainer.plan
    device, number, start, now = trainer.accelerator.device, 0, 0.0, 0.0
    limit = min(LONGEST, max(SHORTEST, PART * seconds))
    model.module.train()
    with closing(trainer.feed.epoch(0, 0)) as batches:
        # of an epoch of a few updates all are measured
        uncounted = min(UNCOUNTED, trainer.feed.updates_per_epoch - 1)
        for number in range(trainer.feed.updates_per_epoch):
            seed_update(trainer.settings.seed, trainer.accelerator.process_index, 0)
            trainer.schedule.rest()
            for batch in islice(batches, plan.accumulate):
                model.add_gradients(*trainer.mixing(batch["pixel_values"], batch["labels"]))
            model.reduce_gradients()
            model.update()
            model.optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = time.monotonic()
            if number + 1 == max(uncounted, 1):
                start = now
            enough = number + 1 >= uncounted + FEWEST and now - start > limit
            if trainer.agreement.any(int(enough)):
                break
    for state in model.optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
    return (now - start) / max(1, number + 1 - max(uncounted, 1))


def _evaluation_seconds(trainer: "Trainer") -> tuple[float, float, float | None]:
    """Return the seconds of an evaluation but for its images, and of an image of one process.

    The third number is that of an image whose batch was kept from an earlier evaluation, or None: none is.
    """
    module, accelerator = trainer.model.whole(trainer.model.module), trainer.accelerator

    def timed(read: Callable[[], list]) -> tuple[float, int, list]:
        """Return the seconds of reading batches and evaluating them, their images, and the batches."""
        start = time.monotonic()
        batches = read()
        measure(module, batches, accelerator, trainer.task.scores(accelerator))
        return time.monotonic() - start, sum(len(batch["labels"]) for batch in batches), batches

    short, few, _ = timed(lambda: list(islice(trainer.feed.val, 1)))
    long, many, batches = timed(lambda: list(islice(trainer.feed.val, 4)))
    again, *_ = timed(lambda: batches)
    image = max(0.0, long - short) / (many - few) if many > few else long / many
    kept = again / many if trainer.feed.val.keeps(batches[0]) else None
    return max(0.0, long - many * image), image, kept
