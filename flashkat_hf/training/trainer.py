"""The training loop: in one process or many, resumable to the bit, ended cleanly by signals and bad losses.

A run is a function of its settings and data. Each update seeds the random numbers it draws, and batches
follow from (seed, epoch, index), so that a checkpoint holds weights, optimiser, averages and a few numbers.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..data.batches import EvalBatches
from ..data.samples import ImageData
from ..files import to_json, write_text
from ..messages import warn
from .defaults import complete_epochs
from .evaluation import Stopped, measure
from .feed import Feed
from .initial_model import load_saved, merged, save_model
from .optimization import Schedule, seed_update
from .pictures import Pictures
from .plan import Plan
from .prepared_model import PreparedModel
from .processes import CODES, Agreement, StopSignals
from .run_folder import RunFolder, write_summary
from .run_log import RunLog, describe
from .speed import Meter
from .state import Checkpoints, Progress, all_finite
from .summary import best_weights, score, summarize
from .task import Task
from .time_budget import epochs_within


@dataclass
class Trainer:
    """One run in one process: a model with its optimiser, batches, and the progress that it has made."""

    plan: Plan
    accelerator: Accelerator
    data: ImageData
    model: PreparedModel
    feed: Feed
    folder: RunFolder
    checkpoints: Checkpoints
    signals: StopSignals
    on_model: Callable[[Path], None] | None  # called in the main process when best/ or last/ is complete
    task: Task
    progress: Progress = field(default_factory=Progress)
    pending: list[tuple[int, float, Tensor]] = field(default_factory=list)  # steps, rates and unread losses
    loading_rate: float | None = None
    started: float = field(default_factory=time.monotonic)
    saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        self.settings = self.plan.settings
        self.main = self.accelerator.is_main_process
        self.agreement = Agreement(self.accelerator.num_processes)
        device = self.accelerator.device if self.plan.replicated else None
        self.schedule = Schedule(self.model.optimizer, self.settings, self.feed.updates_per_epoch, device)
        self.mixing = self.task.mixing(self.settings, len(self.data.class_names))
        self.score = next(iter(self.task.names))  # which the best epoch is chosen by
        self.log = RunLog(self.accelerator, self.folder)
        self.pictures = Pictures(
            self.accelerator, self.folder, self.data, self.model.processor, self.settings.film
        )
        self.meter = Meter(self.accelerator.device)
        self.selection = self.plan.selection

    def choose_epochs(self, started: float) -> None:
        """Choose as many epochs as fit into the settings' time, which began at `started`."""
        self.log.say(f"measuring updates, to train for {self.settings.time}")
        epochs = epochs_within(self, self.settings.seconds or 0.0, started)
        self.log.say(f"--epochs {epochs}: as many as fit into --time {self.settings.time}")
        complete_epochs(self.settings, epochs)
        self.schedule.spread(self.settings)
        self.feed.set_epochs(epochs)

    def run(self, checkpoint: Path | None) -> dict[str, Any] | None:
        """Train from a checkpoint, or from the start; return the summary in the main process."""
        num_steps = self.settings.epochs * self.feed.updates_per_epoch
        self.num_steps = min(num_steps, self.settings.max_steps or num_steps)
        for text in describe(self.plan, self.accelerator, self.model.module, self.feed, self.num_steps):
            self.log.say(text)
        self._restore(checkpoint)
        if self.plan.workers:
            self.log.say("reading the first images")
        holds = self.feed.hold(lambda: self.signals.number)
        if holds and (number := self.agreement.any(self.signals.number)):
            self._stop(number)
        at = self.progress.epoch, self.progress.update
        self.loading_rate = self.feed.loading_rate(*at, lambda: self.signals.number)
        if self.plan.compiled:
            self.log.say("compiling: the first update takes a while")
        try:
            with self.log.show(self.progress.step, self.num_steps):
                while self.progress.step < self.num_steps or self.progress.update:  # or to finish
                    self._train_epoch()
                    self._finish_epoch()
            return self._finish()
        except OSError as error:
            raise OSError(f"{error}; last good checkpoint: {self.checkpoints.newest() or 'none'}") from error

    def _restore(self, checkpoint: Path | None) -> None:
        if checkpoint:
            self.progress = self.checkpoints.load(self.accelerator, checkpoint)
            self.log.say(f"going on after step {self.progress.step}")
        self.log.begin(self.settings, checkpoint)
        self.pictures.begin(self.progress.epoch)
        if not self.progress.step:
            self._picture_functions()
        self.started -= self.progress.seconds
        self.saved_at = time.monotonic()

    def _train_epoch(self) -> None:
        progress = self.progress
        self.model.module.train()
        self.meter = Meter(self.accelerator.device, self.loading_rate)
        with closing(self.feed.epoch(progress.epoch, progress.update)) as batches:
            while progress.update < self.feed.updates_per_epoch and progress.step < self.num_steps:
                self._update(batches)
                self.log.bar.update()
                progress.seconds = time.monotonic() - self.started
                if progress.step % self.settings.log_steps == 0:
                    self._read_losses()
                self._save_if_due()
        self._read_losses()

    def _update(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """Update the weights once, from `accumulate` batches of each process."""
        settings, progress, meter, model = self.settings, self.progress, self.meter, self.model
        seed_update(settings.seed, self.accelerator.process_index, progress.step)
        rate = self.schedule.set(progress.epoch, progress.update)
        total = torch.zeros((), device=self.accelerator.device)
        for _ in range(self.plan.accumulate):
            with meter.waiting():
                batch = next(batches)
            with meter.stepping():
                images, targets = self.mixing(batch["pixel_values"], batch["labels"])
                total += model.add_gradients(images, targets) / self.plan.accumulate
        with meter.stepping():
            model.reduce_gradients()
            skipped = settings.skip_nonfinite and self.agreement.any(not model.gradient_is_finite())
            if not skipped:
                model.update()
            model.optimizer.zero_grad()
        progress.skipped += bool(skipped)
        progress.update += 1
        progress.step += 1
        meter.images += settings.batch_size
        self.pending.append((progress.step, rate, self.accelerator.reduce(total, "mean")))  # pyright: ignore[reportArgumentType]

    def _read_losses(self) -> None:
        """Wait for the device, and take notice of the losses since the last time.

        Raises:
            ValueError: a loss is NaN or infinite; names step, learning rate and the last good checkpoint.
        """
        if not self.pending:
            return
        settings, progress = self.settings, self.progress
        losses = torch.stack([loss for _, _, loss in self.pending]).tolist()
        self.meter.read()
        for (step, rate, _), loss in zip(self.pending, losses, strict=True):
            if not math.isfinite(loss):
                if settings.skip_nonfinite:
                    continue
                raise ValueError(self._not_finite(f"the loss is {loss} at step {step}", rate))
            progress.loss_sum += loss
            progress.losses += 1
            if step == 1 or step % settings.log_steps == 0:
                line = {"kind": "step", "epoch": progress.epoch + 1, "step": step, "loss": loss}
                self.log.note({**line, "learning_rate": rate})
        speed = self.meter.rates()["images_per_second"]
        text = f"loss {losses[-1]:.3f}, lr {self.pending[-1][1]:.1e}, {speed:.0f} images/s"
        self.log.bar.set_postfix_str(text, False)
        self.pending.clear()

    def _not_finite(self, problem: str, rate: float) -> str:
        newest = self.checkpoints.newest()
        flags = "--resume with --skip_nonfinite" if newest else "--skip_nonfinite"
        good = f"last good checkpoint: {newest or 'none'}"
        advice = f"lower --learning_rate, or {flags} leaves such updates out"
        return f"{problem}, learning rate {rate:.3g}; {good}; {advice}"

    def _check_weights(self) -> None:
        """Refuse to save or evaluate weights that are not finite."""
        if self.agreement.any(not all_finite(self.model.module)):
            problem = f"the weights are not finite after step {self.progress.step}"
            raise ValueError(self._not_finite(problem, self.schedule.rate))

    def _save_if_due(self) -> None:
        settings, step = self.settings, self.progress.step
        if settings.checkpoint_steps:
            late = step % settings.checkpoint_steps == 0
        else:
            late = time.monotonic() - self.saved_at > 60 * settings.checkpoint_minutes
        number, due = self.agreement.largest(self.signals.number, int(late))
        if (due and step < self.num_steps) or number:
            self._save()
        if number:
            self._stop(number)

    def _save(self) -> None:
        self._read_losses()
        self._check_weights()
        files = [self.folder.metrics] if self.main else []
        self.checkpoints.save(self.accelerator, self.progress, self.agreement.any, *files)
        self.saved_at = time.monotonic()

    def _stop(self, number: int) -> None:
        if self.log.bar is not None:
            self.log.bar.close()
        if self.main:
            name = "Ctrl-C" if CODES[number] == 130 else "SIGTERM"
            newest = self.checkpoints.newest()
            if newest:
                warn(f"{name}: saved after step {self.progress.step} in {newest}; --resume goes on")
            else:
                warn(f"{name}: nothing is trained yet; --resume begins")
        self.accelerator.end_training()
        raise SystemExit(CODES[number])

    def _finish_epoch(self) -> None:
        """Evaluate, note the epoch, keep the best model."""
        progress, device, epoch = self.progress, self.accelerator.device, self.progress.epoch + 1
        evaluated: dict[str, float] = {}
        due = self.selection.every_epoch and epoch % self.settings.evaluate_epochs == 0
        if due or progress.step >= self.num_steps:
            self._check_weights()
            evaluated = self._evaluate(
                epoch
            )  # it may stop the run, to be done again: nothing is noted before
        progress.epoch = epoch
        line = {"epoch": progress.epoch, "step": progress.step, "learning_rate": self.schedule.rate}
        line |= {"loss": progress.loss_sum / progress.losses} if progress.losses else {}
        line |= self.meter.rates()
        progress.update, progress.losses, progress.loss_sum = 0, 0, 0.0
        if device.type == "cuda":
            progress.peak_memory = max(progress.peak_memory, torch.cuda.max_memory_allocated(device))
        line |= evaluated
        if self.settings.skip_corrupt:
            self._note_unreadable()
            line["skipped_images"] = len(progress.unreadable)
        self.log.note(line)
        self._picture_functions()
        new = progress.last.get("epoch") == progress.epoch
        if new and score(progress.last, self.score) > score(progress.best, self.score):
            progress.best = progress.last
            weights = best_weights(progress.best, self.score)
            average = self.model.average if weights == "ema" else None
            self._write_model("best", (average or self.model).module, progress.best, weights)

    def _evaluate(self, epoch: int) -> dict[str, float]:
        """Return the scores of the model and of its averaged weights, as lines of metrics have them."""
        results: list[dict[str, Any]] = []
        for kind, part in (("", self.model), ("'s averaged weights", self.model.average)):
            if part:
                text = f"evaluating epoch {epoch}{kind}"
                results.append(self._measure(self.model.whole(part.module), self.feed.val, text))
        raw, *averaged = results
        names = self.task.names
        scores = {name: raw[name] for name in names}
        what = names[self.score]
        if self.feed.val is not self.feed.test:
            what = f"{what.removeprefix('test ')} on {self.selection.images}"
        text = f"epoch {epoch}: {what} {raw[self.score]:.2%}"
        if averaged:
            scores |= {f"{name}_ema": averaged[0][name] for name in names}
            text += f", averaged weights {averaged[0][self.score]:.2%}"
        self.progress.last = {"epoch": epoch, "count": raw["count"], **scores}
        self.log.say(text)
        return scores

    def _measure(self, module: nn.Module, batches: EvalBatches, text: str) -> dict[str, Any]:
        """Evaluate a module; a signal saves and ends the run."""
        options = {"keep_progress": False, "stop": lambda: self.signals.number}
        try:
            scores = self.task.scores(self.accelerator)
            return measure(module, batches, self.accelerator, scores, progress=text, **options)
        except Stopped:
            self._save()
            self._stop(self.agreement.any(self.signals.number))
            raise

    def _note_unreadable(self) -> None:
        """Note which images could not be read, in all processes."""
        names = gather_object(self.feed.unreadable())
        self.progress.unreadable = sorted({*self.progress.unreadable, *names})

    def _test_best(self) -> dict[str, Any] | None:
        """Look at the test images with the weights of best/, if they had no part in choosing it."""
        if self.feed.test is self.feed.val:
            return None
        self.accelerator.wait_for_everyone()  # until best/ is written
        model = copy.deepcopy(merged(self.model.whole(self.model.module)))
        load_saved(model, self.folder.best)
        return self._measure(model, self.feed.test, "evaluating the best epoch on the test images")

    def _picture_functions(self) -> None:
        """Show the learned functions as they are, where trackers or a film want them; all processes ask."""
        if self.pictures.wanted(self.model.module):
            self.pictures.add(self.model.whole(self.model.module), self.progress.epoch, self.progress.step)

    def _summary(
        self, results: dict[str, Any], weights: str, test: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        device, size = self.accelerator.device, self.model.processor.crop_size["height"]
        parts = (self.plan, device, self.data, self.progress, size, self.folder.lines())
        return summarize(*parts, list(self.task.names), results, weights, test)

    def _write_model(self, name: str, module: nn.Module, results: dict[str, Any], weights: str) -> None:
        """Replace best/ or last/; the one place where a complete model has just appeared."""
        model = self.model.whole(module)
        if self.main:
            save = partial(save_model, model, self.model.processor)
            self.folder.write_model(name, save, self._summary(results, weights))
            if self.on_model:
                self.on_model(self.folder.path / name)

    def _finish(self) -> dict[str, Any] | None:
        """Write the last model, the summary and the pictures; then the checkpoints have served."""
        self._write_model("last", self.model.module, self.progress.last, "raw")
        model, summary, test = self.model.whole(self.model.module), None, self._test_best()
        if self.settings.skip_corrupt:
            self._note_unreadable()
        if self.main:
            summary = self._summary(self.progress.best, best_weights(self.progress.best, self.score), test)
            write_summary(self.folder.best, summary)
            self.folder.draw(self.schedule.curve(self.num_steps), self.score, self.task.names[self.score])
            self.pictures.finish(model)
            self.folder.write_samples(self.data)
            write_text(self.folder.summary, to_json(summary))
            if not self.settings.keep_after_success:
                self.checkpoints.remove()
            if self.progress.unreadable:
                warn(f"left out: {len(self.progress.unreadable)} images that could not be read")
        self.accelerator.end_training()
        return summary
