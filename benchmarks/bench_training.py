"""Measure the trainer's throughput with the pretraining recipe: JPEG files, synthetic data, two GPUs.

    R=benchmarks/results
    python benchmarks/bench_training.py --output $R/training.jsonl
    python benchmarks/bench_training.py --append --output $R/training.jsonl --cases "synthetic fsdp2"
    python benchmarks/bench_training.py --size micro --batch_size 8 --images 64 --output /dev/null  # on a CPU

One GPU reads JPEG files that are made for it, and the same batch again and again (synthetic); two GPUs do so
with DDP, and train on synthetic data with FSDP2, whose model one process then loads. Each case is a run of
its own, a JSON line, and a row of the table; an epoch counts from the second on, when everything is compiled.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench_data import Settings as Photographs
from bench_data import make_folder
from PIL import Image
from transformers import AutoModelForImageClassification, HfArgumentParser

import flashkat_hf  # noqa: F401 - registers the model
from flashkat_hf.training import feed, train
from flashkat_hf.training.recipe import parse

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "FlashKATLayer",
}
CASES = ("synthetic", "jpeg", "synthetic ddp", "jpeg ddp", "synthetic fsdp2")
RATES = ("images_per_second", "step_images_per_second", "data_images_per_second")
CLASSES = 2  # of bench_data's folder


@dataclass(frozen=True)
class Arguments:
    output: Path = field(metadata={"help": "JSON lines are written here"})
    size: str = field(default="small", metadata={"help": "micro, tiny, small or base"})
    batch_size: int = field(default=512, metadata={"help": "for each GPU"})
    images: int = field(default=2048, metadata={"help": "JPEG files to train on"})
    copies: int = field(default=24, metadata={"help": "names that each file has in the folder"})
    cases: list[str] | None = field(
        default=None, metadata={"help": f"{'; '.join(CASES)}; default: all that can run"}
    )
    append: bool = field(default=False, metadata={"help": "add to the output file instead of starting it"})
    steps: int = field(default=30, metadata={"help": "of an epoch with synthetic data"})
    epochs: int = field(default=3, metadata={"help": "of each run; the first is not counted"})
    processes: int | None = field(
        default=None, metadata={"help": "of the second part; default: GPUs, 2 at most"}
    )
    on_device: str = field(default="auto", metadata={"help": "what the GPU does to images in the jpeg case"})
    workers: int | None = field(
        default=None, metadata={"help": "processes that read images; default: the trainer's"}
    )
    commit: str | None = field(default=None, metadata={"help": "of the code measured; default: asks git"})
    case: str | None = field(default=None, metadata={"help": "used by the script itself"})
    data: str | None = field(default=None, metadata={"help": "likewise"})
    folder: str | None = field(default=None, metadata={"help": "likewise"})

    def __post_init__(self):
        if unknown := set(self.cases or ()) - set(CASES):
            raise SystemExit(f"--cases: {'; '.join(sorted(unknown))} unknown; known are {'; '.join(CASES)}")


class Synthetic:
    """Batches that are one and the same, on the device, as many as an epoch has steps."""

    steps = 0

    def __init__(self, split, transform, *, batch_size: int, **_):
        image = transform(Image.new("RGB", (64, 64)))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        shape = (batch_size, *image.shape)
        self.batch = {
            "pixel_values": torch.randn(shape, device=device),
            "labels": torch.randint(CLASSES, (batch_size,), device=device),
        }

    def __len__(self) -> int:
        return self.steps

    def close(self) -> None:
        pass

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(start, self.steps):
            yield {name: tensor.clone() for name, tensor in self.batch.items()}  # mixing works in place


def work(arguments: Arguments) -> None:
    """Train as one process of a run."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    flags = ["--data", str(arguments.data), "--output", str(arguments.folder), "--size", arguments.size]
    flags += ["--batch_size", str(arguments.batch_size * world), "--epochs", str(arguments.epochs)]
    flags += ["--warmup_epochs", "0", "--evaluate_epochs", str(arguments.epochs)]
    flags += ["--checkpoint_minutes", "1000"]
    if arguments.workers is not None:
        flags += ["--workers", str(arguments.workers)]
    if not torch.cuda.is_available():
        flags += ["--precision", "no"]
    if "jpeg" in arguments.case:
        flags += ["--on_device", arguments.on_device, "--skip_corrupt"]  # files just made need no check
    else:
        Synthetic.steps, feed.TrainBatches = arguments.steps, Synthetic
        flags += ["--workers", "0", "--on_device", "nothing"]
    train(parse(["--recipe", "pretrain-small", *flags]))


def measure(case: str, processes: int, data: str, arguments: Arguments, extra: dict[str, str]) -> dict:
    """Run a case in processes of its own, and return its rates and what it ran on."""
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launch if processes > 1 else []), __file__, "--case", case]
        command += ["--data", data, "--folder", f"{folder}/run", "--output", os.devnull]
        for name in ("size", "batch_size", "steps", "epochs", "on_device", "workers"):
            if (value := getattr(arguments, name)) is not None:
                command += [f"--{name}", str(value)]
        result = subprocess.run(command, env={**os.environ, **extra}, check=False)
        if result.returncode:
            raise SystemExit(f"{case} on {processes} processes failed")
        run = Path(folder, "run")
        summary = json.loads((run / "summary.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        epochs = [line for line in lines if "kind" not in line][1:]
        settings = json.loads((run / "settings.json").read_text())
        AutoModelForImageClassification.from_pretrained(run / "last")  # in one process, made by several
    rates = {rate: round(statistics.median(line[rate] for line in epochs), 1) for rate in RATES}
    names = ("peak_memory_gib", "precision", "compiled", "device", "versions", "commit")
    about = {name: summary[name] for name in names}
    return {
        "case": case,
        "processes": processes,
        "size": arguments.size,
        "batch_size": arguments.batch_size,
        **({"on_device": settings["on_device"]} if "jpeg" in case else {}),
        **rates,
        **about,
        **({"commit": arguments.commit} if arguments.commit else {}),
    }


def chosen_cases(arguments: Arguments, processes: int) -> list[str]:
    """Return the cases asked for, or all that this machine can run.

    Raises:
        SystemExit: one was asked for that it cannot run.
    """
    largest = len(CASES) if torch.cuda.is_available() else 4  # accelerate's FSDP2 is for GPUs
    possible = CASES[: largest if processes > 1 else 2]
    if impossible := [case for case in arguments.cases or () if case not in possible]:
        known = f"with --processes {processes}: {'; '.join(possible)}"
        raise SystemExit(f"--cases: {impossible[0]} cannot run here; {known}")
    return arguments.cases or list(possible)


def main(arguments: Arguments) -> None:
    if arguments.case:
        work(arguments)
        return
    processes = arguments.processes or max(1, min(2, torch.cuda.device_count()))
    cases = chosen_cases(arguments, processes)
    results = []
    with (
        tempfile.TemporaryDirectory() as folder,
        arguments.output.open("a" if arguments.append else "w") as lines,
    ):
        read = any("jpeg" in case for case in cases)
        copies = arguments.copies if read else 1
        images = arguments.images if read else arguments.batch_size * processes  # only counted there
        make_folder(
            Path(folder), Photographs(arguments.output, images, copies, batch_size=arguments.batch_size)
        )
        for case in cases:
            count = 1 if case in CASES[:2] else processes
            results.append(measure(case, count, folder, arguments, FSDP2 if "fsdp2" in case else {}))
            lines.write(json.dumps(results[-1]) + "\n")
            lines.flush()
    print(f"\n{results[0]['device']}, {arguments.size}, {arguments.batch_size} images a device")
    print(f"{'case':18}{'processes':>10}{'images/s':>12}{'step side':>12}{'data side':>12}")
    for result in results:
        rates = "".join(f"{result[rate]:12.0f}" for rate in RATES)
        print(f"{result['case']:18}{result['processes']:10}{rates}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses())
