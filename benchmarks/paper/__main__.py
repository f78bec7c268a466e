"""Run the experiments of the FlashKAT paper that are named; `all` runs every one.

    python -m benchmarks.paper all --output DIR                  # on a GPU
    python -m benchmarks.paper table3 table5 --output DIR --quick
    python -m benchmarks.paper all --output DIR --toy            # anywhere, in Triton's interpreter

Results are lines of JSON, added to DIR/paper.jsonl as they come. A case that fails costs the others nothing;
the program ends with its name.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

if "--toy" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from bench_model import results_file

from . import configurations, kernels, layers, precision, training
from .nsight import NsightError
from .settings import parse
from .summary import summary


def main(arguments: list[str] | None = None) -> None:
    settings = parse(arguments)
    torch.set_float32_matmul_precision("high")
    failures, results = [], []

    @contextmanager
    def attempt(case: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except (RuntimeError, ValueError, NsightError, SystemExit, torch.OutOfMemoryError) as error:
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            failures.append(f"{case}: {message}")
            print(f"failed: {failures[-1]}", flush=True)
        print(f"# {case}: {time.perf_counter() - start:.1f} s", flush=True)

    with results_file(settings) as write_line:

        def write(result: dict) -> None:
            write_line(result)
            results.append(result)

        if "table1" in settings.names:
            with attempt("table1"):
                for result in layers.measure(settings.toy):
                    write(result)
        if {"table6", "table7"} & set(settings.names):
            with attempt("table6, table7"):
                for result in configurations.measure():
                    write(result)
        kernels.measure(settings, write, attempt)
        precision.measure(settings, write, attempt)
        if {"figure1", "table4"} & set(settings.names):
            training.measure(settings, write, attempt)
    print(summary(results))
    if failures:
        raise SystemExit(f"{len(failures)} failed: " + "; ".join(failures))


if __name__ == "__main__":
    main()
