"""The log of a run: its progress, lines of metrics.jsonl, and the same numbers to trackers."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..data.samples import ImageData
from ..files import write_text
from .feed import Feed
from .plan import Plan
from .progress import progress_bar
from .recipe import Settings
from .run_folder import RunFolder


def describe_data(settings: Settings, data: ImageData) -> str:
    """Return the line that says what data a run has."""
    parts = (data.train, data.val, data.test)
    train, val, test = (
        "?" if part is None or part.num_images is None else f"{part.num_images:,}" for part in parts
    )
    val = f" {val} to choose the epoch on," if data.val is not None else ""
    names = ", ".join(data.class_names[:3]) + (", ..." if len(data.class_names) > 3 else "")
    images = f"{train} images to train on,{val} {test} to test"
    return f"data: {settings.data or data.name}, {images}, {len(data.class_names)} classes ({names})"


def describe(
    plan: Plan, accelerator: Accelerator, model: nn.Module, feed: Feed, num_steps: int
) -> Iterator[str]:
    """Yield the lines that say what a run will do, when its model is there."""
    settings, size = plan.settings, "x".join(str(edge) for edge in feed.size)
    whole = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    start = settings.model or f"a fresh {settings.size} FlashKAT"
    part = "" if trained == whole else f", of which {trained:,} learn"
    yield f"model: {start}, {whole:,} parameters{part}, images of {size} pixels"
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    precision = {"no": "float32", "bf16": "bfloat16 beside float32 weights"}.get(
        plan.precision, plan.precision
    )
    ways = ", compiled" * plan.compiled + ", CUDA graphs" * plan.graphed
    yield f"device: {plan.num_processes} x {name}, {precision}{ways}, {plan.workers} workers each"
    parts = f"{plan.num_processes} x {plan.accumulate} x {plan.micro_batch}"
    epochs = f"{settings.epochs} epochs of {feed.updates_per_epoch:,}"
    yield f"training: {num_steps:,} updates ({epochs}), {settings.batch_size} images each ({parts})"
    yield f"output: {settings.output}"


class RunLog:
    """The log of a run; only the main process writes and shows something."""

    def __init__(self, accelerator: Accelerator, folder: RunFolder):
        self.accelerator = accelerator
        self.folder = folder
        self.main = accelerator.is_main_process
        self.bar: Any = None  # until `show`

    def begin(self, settings: Settings, checkpoint: Path | None) -> None:
        """Start metrics.jsonl with the lines of a checkpoint, and the trackers with the settings."""
        if self.main:
            lines = (checkpoint / self.folder.metrics.name).read_text() if checkpoint else ""
            write_text(self.folder.metrics, lines)
            values = settings.to_dict().items()
            config = {name: value for name, value in values if isinstance(value, str | int | float)}
            self.accelerator.init_trackers("flashkat", config)

    def show(self, step: int, num_steps: int) -> Any:
        """Return the progress of the run, a context manager."""
        self.bar = progress_bar(num_steps, "step", initial=step, shown=self.main)
        return self.bar

    def say(self, text: str) -> None:
        """Print a line, above the progress where some is shown."""
        if self.main:
            if self.bar is not None:
                self.bar.clear()
            with suppress(BrokenPipeError):  # of `| head`: training goes on
                print(text, flush=True)
            if self.bar is not None:
                self.bar.refresh()

    def note(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, and its numbers to the trackers."""
        if self.main:
            with self.folder.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        prefix = "train/" if "kind" in line else "epoch/"
        values = {prefix + name: value for name, value in line.items() if isinstance(value, int | float)}
        self.accelerator.log(values, step=line["step"])
