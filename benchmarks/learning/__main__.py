"""Run what the results file does not have yet, in the order of its value.

    python -m benchmarks.learning --output benchmarks/results/learning.jsonl --minutes 7
    python benchmarks/render.py

The first line may be repeated until it says that nothing is missing. It needs Fashion-MNIST (`apt-get install
dataset-fashion-mnist`, or its four files by `--source`), timm and scikit-learn.
"""

import json
import os
import time
from collections.abc import Sequence

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # runs have a stream each; read when CUDA starts

import torch
from bench_model import about, results_file

from .plan import Bench, stages
from .settings import Settings, open_pictures, parse
from .training import OutOfTime


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.monotonic()
    settings = parse(arguments)
    sets = open_pictures(settings)
    rows = earlier(settings)
    if settings.device == "cuda":
        torch.set_float32_matmul_precision("high")
    deadline = start + 60 * settings.minutes if settings.minutes else None
    machine = str(about(settings)["machine"])  # pyright: ignore[reportArgumentType]
    with results_file(settings) as write:  # pyright: ignore[reportArgumentType]
        benches = [Bench(settings, pictures, machine, write, rows, deadline) for pictures in sets.values()]
        try:
            for bench in benches:
                for stage in stages(settings):
                    bench.stage(stage)
                    passed = time.monotonic() - start
                    print(f"# {bench.place['data']}, {stage}: done after {passed:.0f} s", flush=True)
        except OutOfTime:
            print("# the time is over; the same command goes on from here", flush=True)
            return
        except KeyboardInterrupt:
            raise SystemExit("interrupted; the same command goes on from here") from None
    if failures := [failure for bench in benches for failure in bench.failures]:
        raise SystemExit(f"{len(failures)} failed: {'; '.join(failures)}")
    print("# nothing is missing", flush=True)


def earlier(settings: Settings) -> list[dict]:
    """Return the lines that the results file has.

    Raises:
        SystemExit: it cannot be read.
    """
    if not settings.output.exists():
        return []
    try:
        lines = settings.output.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise SystemExit(f"--output: {settings.output} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise SystemExit(f"--output: line {number} of {settings.output} is no JSON; remove it") from error
    return rows


if __name__ == "__main__":
    main()
