"""Train by the defaults alone, a FlashKAT and the ViT of its shape; note how good they are, and the time.

    python -m benchmarks.learning.defaults --output benchmarks/results/defaults.jsonl
    python -m benchmarks.learning.defaults --output benchmarks/results/defaults_gpu.jsonl --data fashion60000

The same command again goes on where it was stopped. Data: scikit-learn's digits, and Fashion-MNIST with
4,000 or all 60,000 training pictures (`fashion_mnist.py` says where they come from; `--source` is a folder of
its files). A run is one of a user's, `flashkat finetune --data FOLDER --seed SEED`, in a process of its own,
timed from its start to its end; the ViT is timm's, by the same rule, and "released" a FlashKAT that starts as
the released ones did. On a GPU the ViT is compiled, its faster mode. Of the test pictures nothing is seen
before the end.

`seconds` is wall time. On a CPU, `process_seconds` is the time that the training process, with one thread
for each of `threads`, had on the cores, over their number: on a machine that others use too, what `seconds`
would be, if reading (in processes of their own) is not what training waits for.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import HfArgumentParser

from .default_tables import defaults_table
from .fashion_mnist import write_folder

PICTURES = {"digits": None, "fashion4000": 4000, "fashion60000": None}  # training pictures, where not all
MODELS = ("flashkat", "vit", "released")
NAMES = (
    "top1 num_test_images selection_top1 num_selection_images num_train_images best_epoch epochs steps "
    "batch_size image_size precision compiled seed images_per_second data_images_per_second "
    "step_images_per_second device versions commit"
)


@dataclass(frozen=True)
class Arguments:
    output: Path = field(metadata={"help": "JSON lines are added to this file"})
    data: list[str] = field(
        default_factory=lambda: ["digits", "fashion4000"], metadata={"help": f"of {', '.join(PICTURES)}"}
    )
    models: list[str] = field(
        default_factory=lambda: list(MODELS), metadata={"help": f"of {', '.join(MODELS)}"}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of the runs"})
    source: Path | None = field(default=None, metadata={"help": "folder of Fashion-MNIST's four files"})
    folders: Path = field(default=Path("runs/fashion"), metadata={"help": "where image folders are made"})
    cores: int = field(default=0, metadata={"help": "that a run may use; default: all"})
    commit: str | None = field(default=None, metadata={"help": "of the code measured; default: asks git"})
    worker: bool = field(default=False, metadata={"help": "one run in this process: what the others start"})

    def __post_init__(self):
        for name, known in (("data", PICTURES), ("models", MODELS)):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise SystemExit(f"--{name}: {unknown[0]} is none of {', '.join(known)}")
        if not 0 <= self.cores <= len(os.sched_getaffinity(0)):
            raise SystemExit(f"--cores: {self.cores} of {len(os.sched_getaffinity(0))}")


def image_folder(arguments: Arguments, data: str) -> Path | None:
    """Return the folder of a data set, made where it is missing; None for the digits."""
    if data == "digits":
        return None
    folder = arguments.folders / data
    if not folder.is_dir():
        try:
            write_folder(folder, PICTURES[data], source=arguments.source)
        except ValueError as error:
            raise SystemExit(str(error)) from error
    return folder


def run(model: str, data: str, folder: Path | None, seed: int) -> dict:
    """Train in this process by the defaults; return what is noted of the run."""
    import torch
    from bench_digits import build_vit

    from flashkat_hf.training import train
    from flashkat_hf.training.recipe import parse

    with tempfile.TemporaryDirectory() as output:
        flags = [
            *(["--data", str(folder)] if folder else []),
            *(["--initializer", "trunc_normal"] if model == "released" else []),
            *(["--compile", "true"] if model == "vit" and torch.cuda.is_available() else []),
            *("--seed", str(seed), "--output", f"{output}/run"),
        ]
        summary = train(parse(flags), build=build_vit if model == "vit" else None)
        settings = json.loads(Path(output, "run", "settings.json").read_text())
    chosen = [
        "size",
        "patch_size",
        "pooling",
        "learning_rate",
        "drop_path",
        "mixup",
        "cutmix",
        "crop",
        "flip",
        "label_smoothing",
    ]
    usage, threads = resource.getrusage(resource.RUSAGE_SELF), torch.get_num_threads()
    return {
        "what": "defaults",
        "data": data,
        "model": model,
        **{name: settings[name] for name in chosen},
        **{name: summary[name] for name in NAMES.split()},
        "process_seconds": round((usage.ru_utime + usage.ru_stime) / threads, 1),
        "threads": threads,
    }


def measure(arguments: Arguments, model: str, data: str, folder: Path | None, seed: int) -> dict:
    """Train in a process of its own, on as many cores as are allowed; return the line of the results."""
    allowed = sorted(os.sched_getaffinity(0))[: arguments.cores or None]
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        "--output",
        str(arguments.output),
        "--worker",
        "--data",
        data,
    ]
    command += ["--models", model, "--seeds", str(seed), "--folders", str(arguments.folders)]
    start = time.perf_counter()
    confine = partial(os.sched_setaffinity, 0, allowed)
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, preexec_fn=confine)
    times = {"seconds": round(time.perf_counter() - start, 1), "cores": len(allowed)}
    if child.returncode:
        raise SystemExit(f"{model} on {data}, seed {seed}: ended with {child.returncode}")
    *text, last = child.stdout.splitlines()
    print(*text, sep="\n")
    return json.loads(last) | times | ({"commit": arguments.commit} if arguments.commit else {})


def main(arguments: Arguments) -> None:
    if arguments.worker:
        data, model, seed = arguments.data[0], arguments.models[0], arguments.seeds[0]
        result = run(model, data, image_folder(arguments, data), seed)
        print(json.dumps(result))
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = arguments.output.read_text() if arguments.output.exists() else ""
    results = [json.loads(line) for line in text.splitlines()]
    done = {(each["data"], each["model"], each["seed"]) for each in results}
    for data in arguments.data:
        folder = image_folder(arguments, data)
        for seed in arguments.seeds:
            for model in arguments.models:
                if (data, model, seed) not in done:
                    results.append(measure(arguments, model, data, folder, seed))
                    with arguments.output.open("a") as file:
                        file.write(json.dumps(results[-1]) + "\n")
    print(defaults_table(results))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses())
