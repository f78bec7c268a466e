"""Measure the trainer with the pretraining recipe on 1, 2, 4 and 8 GPUs: JPEG files and synthetic data.

    R=benchmarks/results/training.jsonl
    python benchmarks/bench_training.py --output $R                                    # all GPUs of this host
    python benchmarks/bench_training.py --append --output $R --size base --batch_size 256
    python benchmarks/bench_training.py --append --output $R --cases "synthetic fsdp2" --processes 2
    python benchmarks/bench_training.py --append --output $R --size 1280x32 --batch_size 64 --processes 2 \
        --cases synthetic "synthetic fsdp2"                                            # ViT-Huge's shape
    python benchmarks/bench_training.py --size micro --batch_size 8 --images 64 --output /dev/null  # on a CPU

Each case is a run of its own, a JSON line, and a row of the table:

- "synthetic": the same batch again and again, already on the GPU.
- "jpeg": JPEG files that are made for it.
- "synthetic fsdp2": weights sharded over the GPUs; one process then loads the model.
- "resume": not measured, but checked: the launcher of several processes gets SIGTERM, the run goes on with
  --resume, and its weights must be those of an undisturbed run to the bit.

An epoch counts from the second on. The time to update 10 starts with the launcher; a checkpoint is saved
after it, which is timed, too. On GPUs one more epoch follows, which does not count: torch.profiler watches
some of its updates in the first process, and finds how long the GPU computes, how long it is in NCCL alone
and how long it does nothing. The other processes keep its pace, since every update is one of all.
"""

import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from bench_data import Settings as Photographs
from bench_data import make_folder
from gpu_trace import chrome_trace, gpu_times
from PIL import Image
from timed_run import UPDATE, after_update
from transformers import AutoModelForImageClassification, HfArgumentParser

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification, make_image_processor
from flashkat_hf.model.configuration_flashkat import SIZES
from flashkat_hf.training import feed, train
from flashkat_hf.training.recipe import parse
from flashkat_hf.training.trainer import Trainer

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "FlashKATLayer",
}
CASES = ("synthetic", "jpeg", "synthetic fsdp2", "resume")
SEVERAL = CASES[2:]  # cases that need several processes
RATES = ("images_per_second", "step_images_per_second", "data_images_per_second")
CLASSES = 2  # of bench_data's folder
WARMING, WATCHED = 2, 8  # updates of the profiler


@dataclass(frozen=True)
class Arguments:
    output: Path = field(metadata={"help": "JSON lines are written here"})
    size: str = field(
        default="small", metadata={"help": "micro, tiny, small, base, or channels x layers, as 1280x32"}
    )
    batch_size: int = field(default=512, metadata={"help": "for each GPU"})
    images: int = field(default=2048, metadata={"help": "JPEG files to train on"})
    copies: int = field(default=24, metadata={"help": "names that each file has in the folder"})
    cases: list[str] | None = field(
        default=None, metadata={"help": f"{'; '.join(CASES)}; default: all that can run"}
    )
    append: bool = field(default=False, metadata={"help": "add to the output file instead of starting it"})
    steps: int = field(default=30, metadata={"help": "of an epoch with synthetic data"})
    epochs: int = field(
        default=3, metadata={"help": "of each run; the first is not counted. On GPUs one more is profiled"}
    )
    processes: list[int] = field(
        default_factory=lambda: [2**n for n in range(max(torch.cuda.device_count(), 1).bit_length())],
        metadata={"help": "numbers of processes, a GPU each; default: 1, 2, 4, ... of this host's GPUs"},
    )
    on_device: str = field(default="auto", metadata={"help": "what the GPU does to images in the jpeg case"})
    workers: int | None = field(
        default=None, metadata={"help": "processes that read images; default: the trainer's"}
    )
    commit: str | None = field(default=None, metadata={"help": "of the code measured; default: asks git"})
    case: str | None = field(default=None, metadata={"help": "used by the script itself"})
    data: str | None = field(default=None, metadata={"help": "likewise"})
    folder: str | None = field(default=None, metadata={"help": "likewise"})
    started: float = field(default=0.0, metadata={"help": "likewise: when the launcher began, since 1970"})
    resume: bool = field(default=False, metadata={"help": "likewise"})
    model: str | None = field(
        default=None, metadata={"help": "likewise: the folder of a model of channels x layers"}
    )

    def __post_init__(self):
        shape = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", self.size)
        if self.size not in SIZES and (not shape or int(shape[1]) % 64):
            known = f"{', '.join(SIZES)}, nor channels (a multiple of 64) x layers, as 1280x32"
            raise SystemExit(f"--size: {self.size} is none of {known}")
        if unknown := set(self.cases or ()) - set(CASES):
            raise SystemExit(f"--cases: {'; '.join(sorted(unknown))} unknown; known are {'; '.join(CASES)}")
        if impossible := [n for n in self.processes if not 1 <= n <= max(torch.cuda.device_count(), 2)]:
            raise SystemExit(f"--processes: {impossible[0]}; there are {torch.cuda.device_count()} GPUs")
        if missing := [case for case in self.cases or () if not self.counts(case)]:
            needs = "several GPUs" if "fsdp2" in missing[0] else "several processes"
            raise SystemExit(f"--cases: {missing[0]} needs {needs}; --processes {max(self.processes)}")

    def counts(self, case: str) -> list[int]:
        """Return the numbers of processes that a case is run on; none where it cannot run."""
        if "fsdp2" in case and not torch.cuda.is_available():
            return []  # accelerate's FSDP2 is for GPUs
        return [number for number in self.processes if number > 1 or case not in SEVERAL]


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
    """Train as one process of a run, and note beside its folder how long it took to begin and to save."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    profiled = torch.cuda.is_available() and arguments.case != "resume"
    epochs = arguments.epochs + profiled
    flags = ["--data", str(arguments.data), "--output", str(arguments.folder)]
    flags += ["--model", arguments.model] if arguments.model else ["--size", arguments.size]
    flags += ["--batch_size", str(arguments.batch_size * world), "--epochs", str(epochs)]
    flags += ["--warmup_epochs", "0", "--evaluate_epochs", str(epochs)]
    flags += ["--checkpoint_minutes", "1000", *(["--resume"] if arguments.resume else [])]
    if arguments.workers is not None:
        flags += ["--workers", str(arguments.workers)]
    if not torch.cuda.is_available():
        flags += ["--precision", "no"]
    if arguments.case in ("jpeg", "resume"):
        flags += ["--on_device", arguments.on_device, "--skip_corrupt"]  # files just made need no check
    else:
        Synthetic.steps, feed.TrainBatches = arguments.steps, Synthetic
        flags += ["--workers", "0", "--on_device", "nothing"]

    def note(trainer: Trainer) -> None:
        reached = time.time()
        if arguments.case != "resume":
            trainer._save()
        if trainer.main:
            times = {"start_up_s": reached - arguments.started, "checkpoint_s": time.time() - reached}
            Path(f"{arguments.folder}.json").write_text(json.dumps(times))
            if profiled:
                watch_updates(trainer, arguments.epochs, Path(f"{arguments.folder}.profile.json"))

    after_update(UPDATE, note)
    train(parse(["--recipe", "pretrain-small", *flags]))


def watch_updates(trainer: Trainer, epoch: int, result: Path) -> None:
    """Profile some updates of an epoch, and write to a file how the GPU spent its time in one of them.

    Epochs count from 0. Nothing is written if the epoch has no update left after those of warm-up.
    """
    updates = min(WATCHED, trainer.feed.updates_per_epoch - WARMING - 1)
    if updates < 1:
        return
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA],
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=1),  # of its two steps, not of updates
    )

    def finish(_: Trainer) -> None:
        profiler.stop()
        result.write_text(json.dumps(gpu_times(chrome_trace(profiler), updates)))

    first = epoch * trainer.feed.updates_per_epoch + 1
    after_update(first, lambda _: profiler.start())
    after_update(first + WARMING, lambda _: profiler.step())
    after_update(first + WARMING + updates, finish)


def command(case: str, processes: int, data: str, folder: Path, arguments: Arguments) -> list[str]:
    """Return the command of a run in processes of its own."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [sys.executable, *(launch if processes > 1 else []), __file__, "--case", case]
    words += ["--data", data, "--folder", str(folder), "--output", os.devnull]
    for name in ("size", "model", "batch_size", "steps", "epochs", "on_device", "workers"):
        if (value := getattr(arguments, name)) is not None:
            words += [f"--{name}", str(value)]
    return [*words, "--started", str(time.time())]


def measure(case: str, processes: int, data: str, arguments: Arguments) -> dict:
    """Run a case in processes of its own, and return its rates and what it ran on."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        extra = FSDP2 if "fsdp2" in case else {}
        words = command(case, processes, data, run, arguments)
        if subprocess.run(words, env={**os.environ, **extra}, check=False).returncode:
            raise SystemExit(f"{case} on {processes} processes failed")
        summary = json.loads((run / "summary.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        epochs = [line for line in lines if "kind" not in line][1 : arguments.epochs]
        settings = json.loads((run / "settings.json").read_text())
        times = json.loads(Path(f"{run}.json").read_text())
        profile = Path(f"{run}.profile.json")
        times |= json.loads(profile.read_text()) if profile.exists() else {}
        AutoModelForImageClassification.from_pretrained(run / "last")  # in one process, made by several
    rates = {rate: round(statistics.median(line[rate] for line in epochs), 1) for rate in RATES}
    names = ("peak_memory_gib", "precision", "compiled", "device", "versions", "commit")
    return {
        **described(case, processes, arguments),
        **({"on_device": settings["on_device"]} if case == "jpeg" else {}),
        **rates,
        **{name: round(seconds, 2) for name, seconds in times.items()},
        **{name: summary[name] for name in names},
        **({"commit": arguments.commit} if arguments.commit else {}),
    }


def check_resuming(case: str, processes: int, data: str, arguments: Arguments) -> dict:
    """Stop the launcher of a run by SIGTERM and let the run go on; compare it with an undisturbed one.

    Raises:
        SystemExit: it was not stopped, or the weights differ.
    """
    weights, codes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("whole", "stopped"):
            run = Path(folder, name)
            words = command(case, processes, data, run, arguments)
            if name == "stopped":
                process = subprocess.Popen(words)
                while not Path(f"{run}.json").exists() and process.poll() is None:
                    time.sleep(0.05)
                process.send_signal(signal.SIGTERM)
                codes.append(process.wait())
                if not (run / "checkpoints").exists():
                    raise SystemExit(f"{case} on {processes} processes: no checkpoint after SIGTERM")
                words.append("--resume")
            if subprocess.run(words, check=False).returncode:
                raise SystemExit(f"{case} on {processes} processes: the {name} run failed")
            weights.append(hashlib.sha256((run / "last" / "model.safetensors").read_bytes()).hexdigest())
        summary = json.loads((run / "summary.json").read_text())
    if weights[0] != weights[1]:
        raise SystemExit(f"{case} on {processes} processes: the weights differ from an undisturbed run's")
    names = ("device", "versions", "commit")
    return {
        **described(case, processes, arguments),
        "same_bits": True,
        "launcher_exit": codes[0],
        **{name: summary[name] for name in names},
        **({"commit": arguments.commit} if arguments.commit else {}),
    }


def save_model(size: str, folder: str) -> str:
    """Save a fresh model of channels x layers, with heads of 64 channels; return the folder."""
    width, layers = map(int, size.split("x"))
    config = FlashKATConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_labels=CLASSES
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        FlashKATForImageClassification(config).save_pretrained(folder)
    make_image_processor(config.image_size).save_pretrained(folder)
    return folder


def described(case: str, processes: int, arguments: Arguments) -> dict:
    """Return what names a result."""
    sizes = {"size": arguments.size, "batch_size": arguments.batch_size}
    return {"case": case, "processes": processes, **sizes}


def main(arguments: Arguments) -> None:
    if arguments.case:
        work(arguments)
        return
    runs = [(case, number) for case in arguments.cases or CASES for number in arguments.counts(case)]
    results = []
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as model,
        arguments.output.open("a" if arguments.append else "w") as lines,
    ):
        reads = {case for case, _ in runs} & {"jpeg", "resume"}
        copies = arguments.copies if reads else 1
        # Without files to read they are only counted.
        images = arguments.images if reads else arguments.batch_size * max(arguments.processes)
        make_folder(
            Path(folder), Photographs(arguments.output, images, copies, batch_size=arguments.batch_size)
        )
        if arguments.size not in SIZES:
            arguments = replace(arguments, model=save_model(arguments.size, model))
        for case, number in runs:
            function = check_resuming if case == "resume" else measure
            results.append(function(case, number, folder, arguments))
            lines.write(json.dumps(results[-1]) + "\n")
            lines.flush()
    print(f"\n{results[0]['device']}, {arguments.size}, {arguments.batch_size} images a device")
    print(f"{'case':18}{'processes':>10}{'images/s':>12}{'step side':>12}{'data side':>12}")
    for result in results:
        rates = "".join(f"{result[rate]:12.0f}" for rate in RATES if rate in result)
        print(f"{result['case']:18}{result['processes']:10}{rates or '  same bits'}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses())
