"""Run each case once where `ncu` looks, a marker before it; `nsight.py` starts this.

ncu ... python -m benchmarks.paper.probe --shape 1024 197 768 "algorithm 2|backward|float32|1"
"""

import argparse
from pathlib import Path

import torch

from .contenders import contenders, draw
from .nsight import Case
from .triton_algorithms import mark


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", type=Case.parse)
    parser.add_argument("--shape", type=int, nargs=3, required=True, help="images, tokens, channels")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--device", default="cuda")
    settings = parser.parse_args(arguments)
    device = torch.device(settings.device)
    known = contenders(settings.peer, compiled=False)
    small = {
        dtype: draw((1, *settings.shape[1:]), getattr(torch, dtype), device.type)
        for dtype in {case.dtype for case in settings.cases}
    }
    mark(device)
    for case in settings.cases:  # compiles, where nobody counts
        call(known, case, small[case.dtype])()
    for case in settings.cases:
        run = call(known, case, draw(tuple(settings.shape), getattr(torch, case.dtype), device.type))
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        mark(device)
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def call(known: dict, case: Case, inputs: tuple):
    contender = known[case.contender]
    return (contender.forward_call if case.direction == "forward" else contender.backward_call)(
        inputs, case.repeats
    )


if __name__ == "__main__":
    main()
