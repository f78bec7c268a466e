"""Hardware counters of kernels, read by Nsight Compute (`ncu`) from a run of `probe.py`.

`ncu` runs each kernel many times over, a few counters at a time. The clocks stay as they are.
"""

import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from . import BENCHMARKS

STATES = (  # that a warp can be in when its instruction is not the next to issue, or is ("selected")
    *("barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle"),
    *("long_scoreboard", "math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction"),
    *("not_selected", "selected", "short_scoreboard", "sleeping", "tex_throttle", "wait"),
)
SECTOR = 32  # bytes
TIMEOUT = 480  # seconds of one run of ncu
SUMS = {  # over the kernels of a case: our name, Nsight Compute's, times
    "cycles": ("gpc__cycles_elapsed.max", 1),
    "counter_ms": ("gpu__time_duration.sum", 1e-6),
    "hbm_read_bytes": ("dram__bytes_read.sum", 1),
    "hbm_write_bytes": ("dram__bytes_write.sum", 1),
    "l2_read_bytes": ("lts__t_sectors_op_read.sum", SECTOR),
    "l2_write_bytes": ("lts__t_sectors_op_write.sum", SECTOR),
    "l2_atomic_bytes": ("lts__t_sectors_op_atom.sum", SECTOR),
    "l2_reduction_bytes": ("lts__t_sectors_op_red.sum", SECTOR),
}
OF_LONGEST = {  # of the kernel that takes the longest
    "sm": ("sm__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "l1": ("l1tex__throughput.avg.pct_of_peak_sustained_active", 1),
    "l2": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "hbm": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", 1),
    **{
        f"warps_{state}": (f"smsp__average_warps_issue_stalled_{state}_per_issue_active.ratio", 1)
        for state in STATES
    },
}
MARKER, TIME = "marker_kernel", SUMS["counter_ms"][0]


class NsightError(Exception):
    """Nsight Compute gave no numbers; the message is one line."""


class Case(NamedTuple):
    """One pass of a contender, as an argument of `probe.py`."""

    contender: str
    direction: str  # forward or backward
    dtype: str = "float32"
    repeats: int = 1

    def __str__(self) -> str:
        return "|".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> "Case":
        contender, direction, dtype, repeats = text.split("|")
        return cls(contender, direction, dtype, int(repeats))


def profile(ncu: str, cases: list[Case], shape: tuple[int, ...], peer: Path | None) -> list[dict]:
    """Return the counters of each case; what this GPU does not count is absent.

    Raises:
        NsightError: `ncu` failed, or did not count all cases.
    """
    probe = [sys.executable, "-m", f"{__package__}.probe", "--shape", *map(str, shape)]
    probe += ["--peer", str(peer)] if peer is not None else []
    metrics = [name for name, _ in (SUMS | OF_LONGEST).values()]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        for _ in range(4):
            options = [
                "--csv",
                "--page",
                "raw",
                "--print-units",
                "base",
                "--log-file",
                str(log),
                "--force-overwrite",
            ]
            options += ["--clock-control", "none", "--target-processes", "all", "--profile-from-start", "off"]
            command = [ncu, *options, "--metrics", ",".join(metrics), *probe, *map(str, cases)]
            try:
                run = subprocess.run(
                    command,
                    cwd=BENCHMARKS.parent,
                    capture_output=True,
                    text=True,
                    timeout=TIMEOUT,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NsightError(f"ncu: {str(error)[-200:]}") from error
            said = (log.read_text() if log.exists() else "") + run.stdout + run.stderr
            unknown = set(re.findall(r"[Ff]ailed to find metric[: ]+'?([\w.]+)", said)) & set(metrics)
            if not unknown:
                break
            metrics = [name for name in metrics if name not in unknown]
    kernels = read(said)
    if not kernels:
        errors = re.findall(r"^==ERROR== (.*)$", said, re.MULTILINE) or said.strip().splitlines()[-1:]
        raise NsightError(f"ncu gave no numbers: {'; '.join(errors) or f'exit status {run.returncode}'}")
    parts = by_case(kernels)
    if len(parts) != len(cases):
        raise NsightError(f"ncu counted {len(parts)} of {len(cases)} cases")
    return [counters(part) for part in parts]


def read(text: str) -> list[dict[str, str]]:
    """Return the kernels in the output of `ncu --csv`, each with its name and metrics."""
    lines = [line for line in text.splitlines() if not line.startswith("==")]
    start = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = [row for row in csv.DictReader(lines[start:]) if (row["ID"] or "").isdigit()]  # not the units
    if not rows or "Metric Name" not in rows[0]:
        return rows
    kernels: dict[str, dict[str, str]] = {}
    for row in rows:
        kernel = kernels.setdefault(row["ID"], {"Kernel Name": row["Kernel Name"]})
        kernel[row["Metric Name"]] = row["Metric Value"]
    return list(kernels.values())


def by_case(kernels: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """Return the kernels behind each marker."""
    parts: list[list[dict[str, str]]] = []
    for kernel in kernels:
        if MARKER in kernel["Kernel Name"]:
            parts.append([])
        elif parts:
            parts[-1].append(kernel)
    return [part for part in parts if part]


def counters(kernels: list[dict[str, str]]) -> dict:
    """Return sums over the kernels of a case, and what the longest of them did."""
    longest = max(kernels, key=lambda kernel: number(kernel.get(TIME)) or 0.0)
    result: dict = {"kernel": longest["Kernel Name"], "kernels": len(kernels)}
    for name, (metric, factor) in SUMS.items():
        values = [number(kernel.get(metric)) for kernel in kernels]
        if None not in values:
            result[name] = sum(values) * factor
    for name, (metric, factor) in OF_LONGEST.items():
        value = number(longest.get(metric))
        if value is not None:
            result[name] = value * factor
    return result


def number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None
