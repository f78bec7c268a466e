"""Seconds and memory of `flashkat convert` for a KAT of the base size with random weights, proof included.

    python benchmarks/bench_conversion_cost.py --output benchmarks/results/conversion_cost.jsonl

The command runs in a process of its own, several times. Memory is the process's peak less that of one that
only imports what the command needs, and less two copies of the weights: the source and the result.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from transformers import HfArgumentParser

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification
from flashkat_hf.conversion.tensor_names import to_original

IMPORTS = "import timm, transformers.models.vit, flashkat_hf.cli"


@dataclass(frozen=True)
class Settings:
    output: Path = field(metadata={"help": "a JSON line is written here"})
    size: str = field(default="base", metadata={"help": "tiny, small or base"})
    repeats: int = field(default=3, metadata={"help": "conversions"})


def cost(*command: str) -> tuple[float, int]:
    """Seconds and peak bytes of a Python process.

    Raises:
        SystemExit: it failed.
    """
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.monotonic() - start, usage.ru_maxrss * 1024


def main(settings: Settings) -> None:
    model = FlashKATForImageClassification(FlashKATConfig.from_size(settings.size, num_labels=1000))
    state = to_original(model.state_dict(), "kat", "cls")
    weights = sum(tensor.nbytes for tensor in state.values())
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder, "kat.pth"))
        idle = [cost("-c", IMPORTS) for _ in range(settings.repeats)]
        convert = ("-m", "flashkat_hf.cli", "convert", f"{folder}/kat.pth", f"{folder}/out", "--overwrite")
        costs = [cost(*convert) for _ in range(settings.repeats)]
    line = {
        "size": settings.size,
        "seconds": round(median(seconds for seconds, _ in costs), 2),
        "seconds_of_imports": round(median(seconds for seconds, _ in idle), 2),
        "weights_gb": round(weights / 1e9, 3),
        "extra_gb": round(
            (max(peak for _, peak in costs) - min(peak for _, peak in idle) - 2 * weights) / 1e9, 3
        ),
        "repeats": settings.repeats,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
    }
    print(json.dumps(line))
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
