"""The training loop.

One process or many, resumable to the bit, stopped cleanly by signals and by what is not finite.

A run is a function of its settings and data. Each update seeds the random numbers it draws, and batches
follow from (seed, epoch, index), so that a checkpoint holds weights, optimiser, averaged weights and a
handful of numbers.
"""

import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..data.augmentation import batch_transform, evaluation_transform, training_transform
from ..data.batches import EvalBatches, TrainBatches
from ..data.prefetch import made_ahead, moved
from ..data.samples import ImageData
from ..files import to_json, write_text
from ..messages import extra, warn
from ..model.modeling_flashkat import FlashKATLayer
from .evaluation import evaluate
from .initial_model import build_model, merged, save_model
from .optimization import (
    AveragedWeights,
    Mixing,
    Schedule,
    make_optimizer,
    seed_update,
    trainable,
    whole_weights,
)
from .processes import CODES, Agreement, StopSignals
from .recipe import Settings
from .run_folder import RunFolder
from .speed import Meter, commit, device_name, loading_rate, versions
from .state import Checkpoints, Progress, all_finite


class Trainer:
    """One run in one process: model, optimiser, batches and where they stand."""

    def __init__(
        self,
        settings: Settings,
        accelerator: Accelerator,
        folder: RunFolder,
        data: ImageData,
        micro_batch: int,
        accumulate: int,
        compiled: bool,
        on_model: Callable[[Path], None] | None = None,
        build: Callable[[Settings, list[str]], tuple[nn.Module, Any]] | None = None,
    ):
        self.settings, self.accelerator, self.folder, self.data = settings, accelerator, folder, data
        self.micro_batch, self.accumulate, self.compiled, self.on_model = (
            micro_batch,
            accumulate,
            compiled,
            on_model,
        )
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.agreement = Agreement(accelerator.num_processes)
        accelerator.gradient_accumulation_steps = accumulate
        seed_update(settings.seed, 2**31, 0)  # weights: alike in every process, and as no update
        model, self.processor = (build or build_model)(settings, data.class_names)
        self._prepare(model)
        self._load_data()
        if not self.updates_per_epoch:
            raise ValueError(f"--batch_size: {settings.batch_size} is more than an epoch has")
        self.schedule = Schedule(self.optimizer, settings, self.updates_per_epoch)
        self.mixing = Mixing(settings, len(data.class_names))
        self.checkpoints = Checkpoints(folder.checkpoints, settings.keep_checkpoints)
        self.progress = Progress()
        self.num_steps = min(settings.epochs * self.updates_per_epoch, settings.max_steps or math.inf)

    def _prepare(self, model: nn.Module) -> None:
        settings, accelerator = self.settings, self.accelerator
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self.unsharded = copy.deepcopy(model).to(self.device) if self.sharded else None
        self.average = AveragedWeights(model, settings.ema_decay) if settings.ema_decay else None
        optimizer = make_optimizer(model, settings, self.device)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            config = cast(Any, accelerator.state.deepspeed_plugin).deepspeed_config
            config["train_micro_batch_size_per_gpu"] = self.micro_batch
            config["gradient_accumulation_steps"] = self.accumulate
        if self.compiled and self.sharded:  # block by block: the gathering of shards stays outside
            for module in model.modules():
                if isinstance(module, FlashKATLayer):
                    module.compile()
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        inner = accelerator.unwrap_model(self.model)
        for name in (
            "forward",
            "_original_forward",
        ):  # less accelerate's mixed precision: evaluation is in float32
            inner.__dict__.pop(name, None)
        if self.average:
            self.average.prepare(accelerator)
        self.forward = self.model
        if self.compiled and not self.sharded:
            mode = compile_mode(settings, accelerator, self.accumulate)
            self.forward = torch.compile(self.model, dynamic=False, mode=mode)

    def _load_data(self) -> None:
        settings, data = self.settings, self.data
        self.workers = settings.worker_processes()
        options = {
            "batch_size": self.micro_batch,
            "rank": self.accelerator.process_index,
            "world_size": self.accelerator.num_processes,
            "pin_memory": self.device.type == "cuda",
        }
        transform = training_transform(self.processor, settings.augmentation)
        epochs = {"epochs": settings.epochs, "seed": settings.seed}
        self.batches = TrainBatches(data.train, transform, workers=self.workers, **epochs, **options)
        workers = 0 if settings.in_memory else self.workers
        transform = evaluation_transform(self.processor)
        self.test_batches = EvalBatches(data.test, transform, workers=workers, **options)
        rest = batch_transform(self.processor, settings.augmentation)
        self.on_device = rest.to(self.device) if rest else partial(moved, self.device)
        # Without workers, batches draw from the generators of this process, and so does the step.
        self.in_background = rest is not None and self.device.type == "cuda" and self.workers > 0
        self.updates_per_epoch = len(self.batches) // self.accumulate

    def run(self, signals: StopSignals, going_on: bool) -> dict[str, Any] | None:
        """Train from where the newest checkpoint stands, or from the start; returns the summary."""
        self.signals, self.started = signals, time.monotonic()
        self._restore(self.checkpoints.newest() if going_on else None)
        self.seconds_before, self.saved_at = self.progress.seconds, time.monotonic()
        self.loading_rate = None
        if self.workers:
            with closing(self._batches()) as batches:
                self.loading_rate = loading_rate(batches, self.workers)
        self.pending: list[tuple[int, float, Tensor]] = []
        interval = 0.1 if sys.stderr.isatty() else 10.0
        bar = partial(
            extra("tqdm").tqdm, unit="step", dynamic_ncols=True, mininterval=interval, disable=not self.main
        )
        try:
            with bar(total=self.num_steps, initial=self.progress.step) as self.bar:
                while (
                    self.progress.step < self.num_steps or self.progress.update
                ):  # or an epoch is to be evaluated
                    self._train_epoch()
                    self._finish_epoch()
            return self._finish()
        except OSError as error:
            raise OSError(f"{error}; last good checkpoint: {self.checkpoints.newest() or 'none'}") from error

    def _restore(self, checkpoint: Path | None) -> None:
        """Where the checkpoint stands, metrics too; without one, the start."""
        if checkpoint:
            self.progress = self.checkpoints.load(self.accelerator, checkpoint)
        if self.main:
            metrics = (checkpoint / self.folder.metrics.name).read_text() if checkpoint else ""
            write_text(self.folder.metrics, metrics)
            values = self.settings.to_dict().items()
            config = {name: value for name, value in values if isinstance(value, str | int | float)}
            self.accelerator.init_trackers("flashkat", config)

    def _train_epoch(self) -> None:
        progress, settings = self.progress, self.settings
        self.model.train()
        self.meter = Meter(self.device, self.loading_rate)
        with closing(self._batches()) as batches:
            while progress.update < self.updates_per_epoch and progress.step < self.num_steps:
                self._update(batches)
                self.bar.update()
                progress.seconds = self.seconds_before + time.monotonic() - self.started
                if progress.step % settings.log_steps == 0:
                    self._read_losses()
                self._save_if_due()
        self._read_losses()

    def _batches(self) -> Generator[dict[str, Tensor], None, None]:
        """Those of the epoch that are still to come, on the device."""
        batches = self.batches.epoch(self.progress.epoch, self.progress.update * self.accumulate)
        decode = getattr(self.on_device, "decode", None)
        return made_ahead(batches, self.on_device, self.device, self.in_background, decode)

    def _update(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """One update of the weights, from `accumulate` batches of each process."""
        settings, accelerator, progress, meter = self.settings, self.accelerator, self.progress, self.meter
        seed_update(settings.seed, accelerator.process_index, progress.step)
        rate = self.schedule.set(progress.epoch, progress.update)
        total = torch.zeros((), device=self.device)
        taken = True
        for _ in range(self.accumulate):
            with meter.waiting():
                batch = next(batches)
            with meter.stepping(), accelerator.accumulate(self.model):
                images, targets = self.mixing(batch["pixel_values"], batch["labels"])
                with accelerator.autocast():
                    loss = self.forward(pixel_values=images, labels=targets).loss
                accelerator.backward(loss)
                total += loss.detach() / self.accumulate
                if accelerator.sync_gradients:
                    if settings.clip_norm:
                        accelerator.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
                    taken = not settings.skip_nonfinite or self._gradients_are_finite()
                if taken:
                    self.optimizer.step()
                self.optimizer.zero_grad()
        if taken and self.average:
            self.average.update(accelerator.unwrap_model(self.model))
        progress.skipped += not taken
        progress.update += 1
        progress.step += 1
        meter.images += settings.batch_size
        self.pending.append((progress.step, rate, accelerator.reduce(total, "mean")))  # pyright: ignore[reportArgumentType]

    def _gradients_are_finite(self) -> bool:
        norm: Any = torch.nn.utils.get_total_norm(
            [p.grad for p in trainable(self.model) if p.grad is not None]
        )
        norm = norm.full_tensor() if self.sharded else norm
        return not self.agreement.any(not math.isfinite(norm.item()))

    def _read_losses(self) -> None:
        """Wait for the device, and take notice of the losses since the last time.

        Raises:
            ValueError: one is NaN or infinite; names the step, the learning rate and the last good
                checkpoint.
        """
        if not self.pending:
            return
        losses = torch.stack([loss for _, _, loss in self.pending]).tolist()
        self.meter.read()
        for (step, rate, _), loss in zip(self.pending, losses, strict=True):
            if not math.isfinite(loss):
                if self.settings.skip_nonfinite:
                    continue
                raise ValueError(self._not_finite(f"the loss is {loss} at step {step}", rate))
            self.progress.loss_sum += loss
            self.progress.losses += 1
            if step % self.settings.log_steps == 0:
                line = {"kind": "step", "epoch": self.progress.epoch + 1, "step": step, "loss": loss}
                self._log({**line, "learning_rate": rate})
        speed = self.meter.rates()["images_per_second"]
        self.bar.set_postfix_str(
            f"loss {losses[-1]:.3f}, lr {self.pending[-1][1]:.1e}, {speed:.0f} images/s", False
        )
        self.pending.clear()

    def _not_finite(self, what: str, rate: float) -> str:
        newest = self.checkpoints.newest()
        return (
            f"{what}, learning rate {rate:.3g}; last good checkpoint: {newest or 'none'}; lower --learning_rate, or "
            f"{'--resume with --skip_nonfinite' if newest else '--skip_nonfinite'} leaves such updates out"
        )

    def _check_weights(self) -> None:
        """Nothing that is not finite may be saved."""
        if self.agreement.any(not all_finite(self.model)):
            what = f"the weights are not finite after step {self.progress.step}"
            raise ValueError(self._not_finite(what, self.schedule.rate))

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
        self.bar.close()
        if self.main:
            name = "Ctrl-C" if CODES[number] == 130 else "SIGTERM"
            warn(
                f"{name}: saved after step {self.progress.step} in {self.checkpoints.newest()}; --resume goes on"
            )
        self.accelerator.end_training()
        raise SystemExit(CODES[number])

    def _finish_epoch(self) -> None:
        """Evaluate, note the epoch, keep the best model."""
        progress = self.progress
        progress.epoch += 1
        line = {"epoch": progress.epoch, "step": progress.step, "learning_rate": self.schedule.rate}
        line |= {"loss": progress.loss_sum / progress.losses} if progress.losses else {}
        line |= self.meter.rates()
        progress.update, progress.losses, progress.loss_sum = 0, 0, 0.0
        if self.device.type == "cuda":
            progress.peak_memory = max(progress.peak_memory, torch.cuda.max_memory_allocated(self.device))
        if progress.epoch % self.settings.evaluate_epochs == 0 or progress.step >= self.num_steps:
            self._check_weights()
            line |= self._evaluate()
        if self.settings.skip_corrupt:
            names = gather_object([*self.batches.corrupt, *self.test_batches.corrupt])
            progress.unreadable = sorted({*progress.unreadable, *names})
            line["skipped_images"] = len(progress.unreadable)
        self._log(line)
        if progress.last.get("epoch") == progress.epoch and score(progress.last) > score(progress.best):
            progress.best = progress.last
            best = (
                self.average.module if self.average and best_weights(progress.best) == "ema" else self.model
            )
            self._write_model("best", best, progress.best, best_weights(progress.best))

    def _evaluate(self) -> dict[str, float]:
        raw = evaluate(self.plain(self.model), self.test_batches, self.accelerator)
        found = {"top1": raw["top1"], "top5": raw["top5"]}
        text = f"epoch {self.progress.epoch}: test accuracy {raw['top1']:.2%}"
        if self.average:
            averaged = evaluate(self.plain(self.average.module), self.test_batches, self.accelerator)
            found |= {"top1_ema": averaged["top1"], "top5_ema": averaged["top5"]}
            text += f", averaged weights {averaged['top1']:.2%}"
        self.progress.last = {"epoch": self.progress.epoch, "count": raw["count"], **found}
        if self.main:
            self.bar.write(text)
        return found

    def plain(self, module: nn.Module) -> nn.Module:
        """The model itself with a module's weights, whole in every process."""
        if self.unsharded is None:
            return self.accelerator.unwrap_model(module)
        self.unsharded.load_state_dict(whole_weights(module))
        return self.unsharded

    def _write_model(self, name: str, module: nn.Module, results: dict[str, Any], weights: str) -> None:
        """Replace best/ or last/; the one place where a complete model has just appeared."""
        model = self.plain(module)
        if self.main:
            self.folder.write_model(
                name, partial(save_model, model, self.processor), self._summary(results, weights)
            )
            if self.on_model:
                self.on_model(self.folder.path / name)

    def _finish(self) -> dict[str, Any] | None:
        """The last model, the summary and the pictures; then the checkpoints have served."""
        self._write_model("last", self.model, self.progress.last, "raw")
        model, summary = self.plain(self.model), None
        if self.main:
            summary = self._summary(self.progress.best, best_weights(self.progress.best))
            write_text(self.folder.best / "summary.json", to_json(summary))
            self.folder.draw(merged(model))
            self.folder.write_samples(self.data)
            write_text(self.folder.path / "summary.json", to_json(summary))
            if not self.settings.keep_after_success:
                self.checkpoints.remove()
            if self.progress.unreadable:
                warn(f"left out: {len(self.progress.unreadable)} images that could not be read")
        self.accelerator.end_training()
        return summary

    def _log(self, line: dict[str, Any]) -> None:
        if self.main:
            self.folder.log(line)
        prefix = "train/" if "kind" in line else "epoch/"
        values = {prefix + name: value for name, value in line.items() if isinstance(value, int | float)}
        self.accelerator.log(values, step=line["step"])

    def _summary(self, results: dict[str, Any], weights: str) -> dict[str, Any]:
        """What there is to know about a model of this run, whose accuracies are `results`."""
        settings, progress, data = self.settings, self.progress, self.data
        suffix = "_ema" if weights == "ema" else ""
        lines = [line for line in self.folder.lines() if "images_per_second" in line]
        rates = ("images_per_second", "data_images_per_second", "step_images_per_second")
        return {
            "data": settings.data or "digits",
            "num_train_images": data.train.num_images,
            "num_test_images": results["count"],
            "num_labels": len(data.class_names),
            "image_size": self.processor.crop_size["height"],
            "epochs": progress.epoch,
            "steps": progress.step,
            "batch_size": settings.batch_size,
            "top1": results[f"top1{suffix}"],
            "top5": results[f"top5{suffix}"],
            "top1_raw": results["top1"],
            "top1_ema": results.get("top1_ema"),
            "weights": weights,
            "best_epoch": progress.best["epoch"],
            **{rate: statistics.median(line[rate] for line in lines) if lines else None for rate in rates},
            "peak_memory_gib": round(progress.peak_memory / 2**30, 2) if progress.peak_memory else None,
            "device": device_name(self.device),
            "num_processes": self.accelerator.num_processes,
            "precision": self.accelerator.mixed_precision,
            "compiled": self.compiled,
            "started_from": settings.model,
            "seed": settings.seed,
            "skipped_updates": progress.skipped,
            "skipped_images": len(progress.unreadable),
            "seconds": round(progress.seconds, 1),
            "versions": versions(),
            "commit": commit(),
        }


def compile_mode(settings: Settings, accelerator: Accelerator, accumulate: int) -> str | None:
    """With CUDA graphs where they serve: the host has time for the batches then.

    Not where gradients accumulate: a replay writes where those of the replay before are.
    """
    known = accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU)
    serve = known and accelerator.device.type == "cuda" and accumulate == 1
    return "reduce-overhead" if serve and settings.cuda_graphs else None


def score(results: dict[str, Any]) -> float:
    """The better of the raw and the averaged weights' accuracies; -1 where nothing was evaluated."""
    return max(results.get("top1", -1.0), results.get("top1_ema", -1.0))


def best_weights(results: dict[str, Any]) -> str:
    return "ema" if results.get("top1_ema", -1.0) > results["top1"] else "raw"
