"""Measure whole runs as users start them: transformers' Trainer, ours, and how long a run takes to begin.

    python benchmarks/bench_runs.py --output benchmarks/results/runs.jsonl

- "Trainer": transformers' Trainer, small, 224 pixels, bfloat16, images in memory: stock with our model and
  with transformers' ViT, eager and compiled, and `GraphedTrainer`. They take turns of short runs in one
  process; a result is the 10th percentile of the time between updates.
- "start": seconds from the start of the process to the 10th update of our trainer, and what of them each part
  takes (timed_run.py). Kernels are cached by a run before, and so are Python's compiled files, as pip leaves
  them: a machine without them (`PYTHONDONTWRITEBYTECODE`, a folder that cannot be written) compiles all anew.
- "jpeg": our trainer on 3,200 photographs, 64 at a time, 3 epochs, by default settings: images per second of
  the later epochs, and the wall time of the process.
- "accumulated": the same data already on the device, one batch of 64, and 4 of 64 that accumulate.

Each result is a JSON line with the GPU, the versions and the commit.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy
import torch
import transformers
from bench_data import Settings as Photographs
from bench_data import make_folder
from bench_model import about, refuse_unknown, transformers_vit
from timed_run import UPDATE
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification, GraphedTrainer

CASES = ("Trainer", "start", "jpeg", "accumulated")
MODES = ("eager", "compiled")
BATCH_SIZES = (16, 64)


@dataclass(frozen=True)
class Settings:
    output: Path = field(metadata={"help": "JSON lines are written here"})
    cases: list[str] = field(default_factory=lambda: list(CASES), metadata={"help": ", ".join(CASES)})
    modes: list[str] = field(default_factory=lambda: list(MODES), metadata={"help": "of the Trainer"})
    batch_sizes: list[int] = field(
        default_factory=lambda: list(BATCH_SIZES), metadata={"help": "of the Trainer"}
    )
    size: str = field(default="small", metadata={"help": "tiny, small or base"})
    steps: int = field(
        default=25, metadata={"help": "updates of a turn of the Trainer; the first 5 are not counted"}
    )
    turns: int = field(default=2, metadata={"help": "turns of each Trainer"})
    images: int = field(default=3200, metadata={"help": "photographs"})
    commit: str | None = field(default=None, metadata={"help": "of the code measured; default: asks git"})

    def __post_init__(self):
        refuse_unknown("--cases", self.cases, CASES)
        refuse_unknown("--modes", self.modes, MODES)

    device = "cuda" if torch.cuda.is_available() else "cpu"


class Images(torch.utils.data.Dataset):
    """Images in memory, with labels."""

    def __init__(self, number: int):
        self.number = number
        self.images = torch.randn(64, 3, 224, 224)

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.images[index % 64], "labels": index % 1000}


class Clock(TrainerCallback):
    """The time of each update."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, *_, **__) -> None:
        self.times.append(time.perf_counter())


def trainer_runs(settings: Settings) -> Iterator[dict]:
    """Time transformers' Trainer and ours of it, by turns."""
    gpu = settings.device == "cuda"

    def flashkat():
        return FlashKATForImageClassification(FlashKATConfig.from_size(settings.size, num_labels=1000))

    def vit():
        return transformers_vit(settings.size, 224).model

    modes = [(mode, {"torch_compile": mode == "compiled"}) for mode in settings.modes]
    kinds = [
        (name, mode, kind, make, options)
        for name, kind, make in (("flashkat_hf", Trainer, flashkat), ("transformers ViT", Trainer, vit))
        for mode, options in modes
    ]
    kinds.append(("flashkat_hf", "GraphedTrainer", GraphedTrainer, flashkat, {}))
    for batch_size in settings.batch_sizes:
        torch.compiler.reset()  # else the second batch size is compiled for any size
        models = [make() for *_, make, _ in kinds]
        intervals: list[list[float]] = [[] for _ in kinds]
        for _ in range(settings.turns):
            for (_, _, kind, _, options), model, found in zip(kinds, models, intervals, strict=True):
                with tempfile.TemporaryDirectory() as folder:
                    arguments = TrainingArguments(
                        folder,
                        max_steps=settings.steps,
                        per_device_train_batch_size=batch_size,
                        bf16=gpu,
                        report_to=[],
                        save_strategy="no",
                        disable_tqdm=True,
                        logging_steps=10**6,
                        **options,
                    )
                    clock = Clock()
                    data = Images(batch_size * settings.steps)
                    kind(model=model, args=arguments, train_dataset=data, callbacks=[clock]).train()
                times = clock.times[5:]
                found += [after - before for before, after in pairwise(times)]
        for (name, mode, *_), found in zip(kinds, intervals, strict=True):
            rates = {"images_per_s": numpy.percentile(found, 10), "median_images_per_s": median(found)}
            case = {"case": "Trainer", "provider": name, "mode": mode, "batch_size": batch_size}
            yield case | {rate: round(batch_size / float(seconds), 1) for rate, seconds in rates.items()}


def run(
    settings: Settings, data: str, *flags: str, synthetic: bool = False, bytecode: Path | None = None
) -> dict:
    """Run our trainer in a process of its own; return its rates, its wall time and the parts of its start."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--data", data, "--output", f"{folder}/run", "--size", settings.size, *flags)
        started = time.time()
        given = json.dumps({"flags": flags, "synthetic": synthetic, "started": started})
        command = [sys.executable, Path(__file__).with_name("timed_run.py"), given]
        environment = dict(os.environ)
        if bytecode:  # a folder for Python's compiled files
            environment |= {"PYTHONPYCACHEPREFIX": str(bytecode), "PYTHONDONTWRITEBYTECODE": ""}
        finished = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment)
        if finished.returncode:
            raise SystemExit(f"{' '.join(flags)}: the run ended with {finished.returncode}; see above")
        wall = time.time() - started
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        rates = [line["images_per_second"] for line in lines if "kind" not in line]
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    start = json.loads(finished.stdout.rpartition("\nstart ")[2].splitlines()[0])
    return {
        "images_per_s": round(median(rates[1:] or rates), 1),
        "wall_s": round(wall, 1),
        "update_10_s": round(sum(start.values()), 1),
        "start_s": start,
        "peak_gib": summary["peak_memory_gib"],
    }


def our_runs(settings: Settings) -> Iterator[dict]:
    """Run our trainer on photographs and on what is on the device already."""
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), Photographs(settings.output, settings.images, 1))
        common = ("--batch_size", "64")
        if "start" in settings.cases:
            short = (*common, "--epochs", "1", "--max_steps", str(UPDATE))
            with tempfile.TemporaryDirectory() as bytecode:
                run(settings, folder, *short, bytecode=Path(bytecode))  # it and the kernels get cached
                found = run(settings, folder, *short, bytecode=Path(bytecode))
            parts = {name: found[name] for name in ("update_10_s", "start_s")}
            yield {"case": "start", "mode": "default", "batch_size": 64} | parts
        if "jpeg" in settings.cases:
            found = run(settings, folder, *common, "--epochs", "3")
            yield {"case": "jpeg", "mode": "default", "batch_size": 64} | found
        if "accumulated" in settings.cases:
            for batches in (1, 4):
                flags = ("--batch_size", str(64 * batches), "--micro_batch", "64", "--epochs", "3")
                flags += ("--workers", "0", "--on_device", "nothing", "--evaluate_epochs", "3")
                case = {"case": "accumulated", "mode": f"{batches} x 64", "batch_size": 64 * batches}
                yield case | run(settings, folder, *flags, synthetic=True)


def main(settings: Settings) -> None:
    facts = about(settings) | {"transformers": transformers.__version__, "size": settings.size}
    with settings.output.open("a") as lines:
        parts = [trainer_runs] if "Trainer" in settings.cases else []
        parts += [our_runs] if {*settings.cases} - {"Trainer"} else []
        for part in parts:
            for result in part(settings):
                print(json.dumps(result), flush=True)
                lines.write(json.dumps(result | facts) + "\n")
                lines.flush()


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
