"""Run the examples of dense tasks as they are, and note how good both backbones become, and the time.

    python benchmarks/bench_dense.py --output benchmarks/results/dense.jsonl --pictures docs

The same command again goes on where it was stopped. A run is `python examples/segment.py --seed SEED` or
`detect.py`, in a process of its own, timed from its start to its end: a FlashKAT and the ViT of its shape,
one after the other. `--pictures` is a folder for what the first seed's runs draw.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from flashkat_hf.training.summary import commit, versions

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURES = {"segment": "masks.png", "detect": "boxes.png"}  # what each example draws


@dataclass(frozen=True)
class Arguments:
    output: Path = field(metadata={"help": "JSON lines are added to this file"})
    examples: list[str] = field(
        default_factory=lambda: list(PICTURES), metadata={"help": f"of {', '.join(PICTURES)}"}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of the runs"})
    pictures: Path | None = field(default=None, metadata={"help": "folder for the first seed's pictures"})

    def __post_init__(self):
        if unknown := sorted(set(self.examples) - set(PICTURES)):
            raise SystemExit(f"--examples: {unknown[0]} is none of {', '.join(PICTURES)}")


def measure(example: str, seed: int, picture: Path | None) -> list[dict]:
    """Run an example; return a line of the results for each of its two models."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        flags = ["--seed", str(seed), "--output", str(output)]
        start = time.perf_counter()
        subprocess.run([sys.executable, str(EXAMPLES / f"{example}.py"), *flags], check=True)
        seconds = round(time.perf_counter() - start, 1)
        scores = json.loads((output / "summary.json").read_text())
        runs = {kind: json.loads((output / kind / "summary.json").read_text()) for kind in scores}
        if picture:
            shutil.copyfile(output / PICTURES[example], picture)
    return [
        {
            "what": example,
            "model": kind,
            "seed": seed,
            "scores": scores[kind],
            "updates": runs[kind]["steps"],
            "batch_size": runs[kind]["batch_size"],
            "seconds_of_both": seconds,
            "device": runs[kind]["device"],
            "versions": versions(),
            "commit": commit(),
        }
        for kind in scores
    ]


def main(arguments: Arguments) -> None:
    text = arguments.output.read_text() if arguments.output.exists() else ""
    done = {(row["what"], row["seed"]) for row in map(json.loads, text.splitlines())}
    for example in arguments.examples:
        for seed in arguments.seeds:
            if (example, seed) not in done:
                first = arguments.pictures is not None and seed == arguments.seeds[0]
                rows = measure(example, seed, arguments.pictures / f"{example}.png" if first else None)
                with arguments.output.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses())
