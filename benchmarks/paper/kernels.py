"""The rational alone: tables 2 and 3 of the paper, its warp states (figures 2 and 3), its memory accesses."""

import math
import time
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from statistics import mean, stdev

import torch

from flashkat_hf.model.triton_rational import backward_plan

from . import nsight
from .contenders import (
    ALGORITHM1,
    ALGORITHM2,
    COMPILED,
    EAGER,
    OURS,
    RELAXED,
    Contender,
    check,
    contenders,
    draw,
)
from .nsight import Case
from .published import GROUPS
from .settings import Settings
from .triton_algorithms import ROWS

Write = Callable[[dict], None]
COEFFICIENTS = 10  # m + 1 + n


def interval(values: list[float]) -> float:
    """Return half of the 95% interval of the mean."""
    return 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def milliseconds(run: Callable, device: str, budget: float, most: int) -> list[float]:
    """Return times of one call: as many as fit `budget` milliseconds, from 3 to `most`."""
    if device == "cpu":
        times = []
        for _ in range(2):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        return times
    run()  # compiles, allocates

    def timed(count: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(events)]

    [first] = timed(1)
    return timed(max(3, min(most, int(budget / first))))


def cases(settings: Settings) -> list[Case]:
    """Return what the chosen tables time and count, the slow algorithm last."""
    chosen = []
    backward = [OURS, ALGORITHM2, RELAXED, ALGORITHM1]
    if {"table3", "figure2", "figure3", "memory"} & set(settings.names):
        chosen += [Case(OURS, "backward", "bfloat16")]
        chosen += [Case(name, "backward") for name in backward]
    if "table2" in settings.names:
        chosen += [Case(OURS, "forward")]
        chosen += [Case(ALGORITHM1, "forward", repeats=times) for times in settings.repeats]
        chosen += [
            Case(name, "backward", repeats=times)
            for name, times in product((ALGORITHM2, ALGORITHM1), settings.repeats)
        ]
    wanted = settings.contenders
    chosen = [case for case in chosen if wanted is None or case.contender in wanted]
    return sorted(
        dict.fromkeys(chosen), key=lambda case: (case.contender, case.direction) == (ALGORITHM1, "backward")
    )


def only_timed(settings: Settings) -> list[Case]:
    """Return further contenders of table 3, many kernels each, which are not counted."""
    if "table3" not in settings.names or settings.contenders:
        return []
    originals = [name for name in contenders(settings.peer, compiled=False) if "original" in name]
    return [Case(name, "backward") for name in (EAGER, COMPILED, *originals)]


def measure(settings: Settings, write: Write, attempt: Callable) -> None:
    """Write times, then counters, so that no time is missing where a counter fails."""
    known = contenders(settings.peer, compiled=not settings.toy)
    chosen = cases(settings)
    if not chosen:
        return
    if settings.ncu is None:
        print("no ncu: times alone, no cycles, throughputs, warp states and bytes", flush=True)
    if not settings.toy and {"table2", "table3"} & set(settings.names):
        from bench_rational import copy_bandwidth

        write({"what": "copy", "gb_per_s": round(copy_bandwidth(repeats=3) / 1e9, 1)})
    for case in [*chosen, *only_timed(settings)] if {"table2", "table3"} & set(settings.names) else ():
        if case.contender in known:  # nothing is compiled at toy size
            with attempt(str(case)):
                write(timed(known[case.contender], case, settings))
    if "memory" in settings.names:
        for result in accesses(settings):
            write(result)
    if settings.ncu is None:
        return
    slow = [
        case for case in chosen if case.contender in (ALGORITHM1, RELAXED) and case.direction == "backward"
    ]
    for part in filter(None, ([case for case in chosen if case not in slow], slow)):
        with attempt("Nsight Compute"):
            counted = nsight.profile(settings.ncu, part, settings.shape, settings.peer)
            for case, counters in zip(part, counted, strict=True):
                write({"what": "counters", **described(case, settings), **counters})


def described(case: Case, settings: Settings) -> dict:
    return {**case._asdict(), "shape": list(settings.shape)}


def timed(contender: Contender, case: Case, settings: Settings) -> dict:
    dtype = getattr(torch, case.dtype)
    check(contender, dtype, settings.device, repeats=(case.repeats,))
    inputs = draw(settings.shape, dtype, settings.device)
    call = contender.forward_call if case.direction == "forward" else contender.backward_call
    budget = 100 if settings.quick else 300
    times = milliseconds(call(inputs, case.repeats), settings.device, budget, most=100)
    return {
        "what": "kernel",
        **described(case, settings),
        "ms": round(mean(times), 4),
        "ms_interval": round(interval(times), 5),
        "runs": len(times),
    }


def accesses(settings: Settings) -> Iterator[dict]:
    """Yield how many numbers a backward pass reads, writes and adds atomically, by formulas."""
    images, tokens, channels = settings.shape
    elements, group_size = images * tokens * channels, channels // GROUPS
    blocks = math.ceil(images * tokens / ROWS) * GROUPS
    x = torch.empty(settings.shape, device=settings.device)
    tables = (torch.empty(GROUPS, columns, device=settings.device) for columns in (6, 4))
    tile, layout, rows = backward_plan(x, *tables)
    programs, sums = tile.num_programs * tile.segments, COEFFICIENTS * rows * layout[1]
    for name, reads, writes, atomics in (
        (ALGORITHM1, (2 + COEFFICIENTS) * elements, elements, COEFFICIENTS * elements),
        (ALGORITHM2, 2 * elements + COEFFICIENTS * blocks, elements, COEFFICIENTS * blocks),
        (OURS, 2 * elements + COEFFICIENTS * programs + sums, elements + sums, 0),
    ):
        yield {
            "what": "accesses",
            "contender": name,
            "shape": list(settings.shape),
            "reads": reads,
            "writes": writes,
            "atomics": atomics,
            # an atomic addition reads and writes: 3 (m + n + 2) for each element in algorithm 1
            "accesses": reads + writes + 2 * atomics,
            "rows_of_block": ROWS,
            "group_size": group_size,
        }
