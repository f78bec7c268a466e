"""What a run measures besides its loss: images per second of each side, and what it ran on."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .._version import __version__

PACKAGES = ("transformers", "accelerate", "timm", "triton")
PROBE_SECONDS = 2.0


class Meter:
    """Images per second of a stretch of training: end to end, of the data side and of the step side.

    The step side is what the device is busy for, by its own clock on a GPU, from a batch that is made to the
    update. The data side is what the reading of batches takes; worker processes read while the device works,
    so that they are measured alone, before training (`loading_rate`).

    Args:
        device: of the model.
        loading_rate: images per second of worker processes, where there are some.
    """

    def __init__(self, device: torch.device, loading_rate: float | None):
        self.device, self.loading_rate = device, loading_rate
        self.images, self.wait_seconds, self.step_seconds = 0, 0.0, 0.0
        self.start = self.end = time.perf_counter()
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.wait_seconds += time.perf_counter() - start

    @contextmanager
    def stepping(self) -> Iterator[None]:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.events.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self.step_seconds += time.perf_counter() - begin

    def read(self) -> None:
        """Take the time of what the device has finished; called when it has been waited for."""
        self.end = time.perf_counter()
        self.step_seconds += sum(start.elapsed_time(end) for start, end in self.events) / 1e3
        self.events.clear()

    def rates(self) -> dict[str, float]:
        """The three rates, as lines of metrics have them; nothing where there were no images."""
        if not self.images:
            return {}
        data = self.loading_rate or self.images / max(self.wait_seconds, 1e-9)
        rates = {
            "images_per_second": self.images / max(self.end - self.start, 1e-9),
            "data_images_per_second": data,
            "step_images_per_second": self.images / max(self.step_seconds, 1e-9),
        }
        return {name: round(rate, 1) for name, rate in rates.items()}


def loading_rate(
    batches: Iterator[dict[str, torch.Tensor]], workers: int, seconds: float = PROBE_SECONDS
) -> float | None:
    """Images per second that come while nothing else happens, once each worker has given a batch.

    Each gives at least one more, since they are made side by side; None where there are not so many.
    """
    images, number, start, last = 0, 0, 0.0, 0.0
    for number, batch in enumerate(batches, start=1):
        last = time.perf_counter()
        if number <= workers:
            start = last  # they are still starting
            continue
        images += len(batch["labels"])
        if number >= 2 * workers and last - start > seconds:
            break
    return images / max(last - start, 1e-9) if number >= 2 * workers else None


def cores() -> int:
    """Of the processor, that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def versions() -> dict[str, str | None]:
    """Of Python and the packages that a result depends on; None for one that is absent."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "flashkat_hf": __version__}


def commit() -> str | None:
    """The git commit of this package's checkout, with "-dirty" if files differ; None outside git."""
    here = Path(__file__)
    texts = []
    for arguments in (
        ["ls-files", "--error-unmatch", here.name],  # else it is installed somewhere below another repository
        ["rev-parse", "HEAD"],
        ["status", "--porcelain", "--untracked-files=no"],
    ):
        try:
            result = subprocess.run(
                ["git", "-C", here.parent, *arguments], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        if result.returncode:
            return None
        texts.append(result.stdout.strip())
    return texts[1] + ("-dirty" if texts[2] else "")
