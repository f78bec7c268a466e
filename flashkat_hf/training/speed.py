"""Images per second of a run, of each of its sides; and the cores that it may use."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

PROBE_SECONDS = 0.5
PROBE_LONGEST = 10.0  # seconds after the first batch


@dataclass
class Meter:
    """Images per second of a stretch of training: end to end, of the data side and of the step side.

    The step side is what the device is busy for, by its own clock on a GPU, from a batch that is made to the
    update. The data side is what the reading of batches takes; worker processes read while the device works,
    so that they are measured alone, before training (`loading_rate`).
    """

    device: torch.device
    loading_rate: float | None = None  # of worker processes, in images per second; None without workers
    images: int = 0  # number of images trained on
    wait_seconds: float = 0.0
    step_seconds: float = 0.0
    start: float = field(default_factory=time.perf_counter)
    end: float = field(default_factory=time.perf_counter)
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time that a batch is waited for."""
        start = time.perf_counter()
        yield
        self.wait_seconds += time.perf_counter() - start

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Measure the time that the device computes; on a GPU it is known after `read`."""
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
        """Return the three rates, as lines of metrics have them; nothing where there were no images."""
        if not self.images:
            return {}
        rates = {
            "images_per_second": self.images / max(self.end - self.start, 1e-9),
            "data_images_per_second": self.loading_rate or self.images / max(self.wait_seconds, 1e-9),
            "step_images_per_second": self.images / max(self.step_seconds, 1e-9),
        }
        return {name: round(rate, 1) for name, rate in rates.items()}


def loading_rate(
    batches: Iterator[dict[str, torch.Tensor]], workers: int, seconds: float = PROBE_SECONDS
) -> float | None:
    """Return the images per second that come while nothing else happens, once each worker has given a batch.

    Each gives at least one more, since they are made side by side; None where there are not so many, or not
    within `PROBE_LONGEST` seconds.
    """
    images, number, start, last, first = 0, 0, 0.0, 0.0, math.inf
    for number, batch in enumerate(batches, start=1):
        last = time.perf_counter()
        first = min(first, last)
        if number <= workers and last - first <= PROBE_LONGEST:
            start = last  # they are still starting
            continue
        images += len(batch["labels"])
        if last - first > PROBE_LONGEST or (number >= 2 * workers and last - start > seconds):
            break
    return images / max(last - start, 1e-9) if number >= 2 * workers else None


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
