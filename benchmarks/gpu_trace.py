"""Read from a profile which kernels a GPU ran, and how long it computed, was in NCCL alone or was idle."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.profiler import profile

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of Kineto's events


def chrome_trace(profiler: "profile") -> dict:
    """Return what a profiler that was stopped has seen, as a Chrome trace."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())


def gpu_events(trace: dict) -> list[dict[str, Any]]:
    """Return the events of a trace that took place on a GPU."""
    return [event for event in trace["traceEvents"] if event.get("cat") in ON_GPU]


def gpu_times(trace: dict, updates: int) -> dict[str, float]:
    """Return how a GPU spent its time in some updates, in milliseconds of one; nothing without events.

    `compute_ms` is the time in which anything but NCCL ran, `nccl_ms` the time in which nothing but NCCL ran
    (which includes waiting for other GPUs), `idle_ms` the time in between in which nothing ran.
    """
    events = gpu_events(trace)
    if not events:
        return {}
    busy = _covered(events)
    compute = _covered([event for event in events if "nccl" not in event["name"].lower()])
    begin = min(event["ts"] for event in events)
    end = max(event["ts"] + event["dur"] for event in events)
    times = {"compute_ms": compute, "nccl_ms": busy - compute, "idle_ms": end - begin - busy}
    return {name: round(microseconds / updates / 1e3, 2) for name, microseconds in times.items()}


def _covered(events: list[dict[str, Any]]) -> float:
    """Return the microseconds in which at least one event took place."""
    covered, until = 0.0, 0.0
    for event in sorted(events, key=lambda event: event["ts"]):
        end = event["ts"] + event["dur"]
        covered += max(end - max(event["ts"], until), 0.0)
        until = max(until, end)
    return covered
