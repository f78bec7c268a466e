"""Seconds of `torch.export` and `torch.compile` for a FlashKAT beside timm's ViT of the same size, on a CPU.

    python benchmarks/bench_compilation.py --output benchmarks/results/compilation.jsonl

The models take turns in one process, and the fastest of the rounds counts. Beside the wall's clock stands the
time that processors worked, the C++ compiler's included, which other work on the machine changes less. What
is compiled is a training step, forward and backward, with Inductor's caches off. The first round loads the
compilers, too, and is left out.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from bench_deployment import processor
from torch import Tensor, nn
from transformers import HfArgumentParser

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification
from flashkat_hf.training.summary import commit

OURS, VIT = "flashkat_hf", "timm ViT"
IMAGES = 2


@dataclass(frozen=True)
class Settings:
    output: Path = field(metadata={"help": "JSON lines are added here"})
    size: str = field(default="tiny", metadata={"help": "tiny, small or base"})
    rounds: int = field(default=3, metadata={"help": "that count"})
    tasks: list[str] = field(default_factory=lambda: ["export", "compile"])


def make(provider: str, size: str) -> nn.Module:
    if provider == VIT:
        return timm.create_model(f"vit_{size}_patch16_224")
    return FlashKATForImageClassification(FlashKATConfig.from_size(size, num_labels=1000))


def export(model: nn.Module, pixels: Tensor) -> dict[str, int]:
    program = torch.export.export(model.eval(), (pixels,))
    return {"nodes": len(program.graph.nodes)}


def compile_step(model: nn.Module, pixels: Tensor) -> dict[str, int]:
    torch._dynamo.reset()
    output: Any = torch.compile(model.train())(pixels)
    (output if isinstance(output, Tensor) else output.logits).sum().backward()
    return {}


TASKS: dict[str, Callable[[nn.Module, Tensor], dict[str, int]]] = {"export": export, "compile": compile_step}


def measure(task: str, provider: str, size: str) -> dict[str, float]:
    """Return the seconds of one go, with what the task counts."""
    model, pixels = make(provider, size), torch.randn(IMAGES, 3, 224, 224)
    before, start = os.times(), time.perf_counter()
    counts = TASKS[task](model, pixels)
    after, seconds = os.times(), time.perf_counter() - start
    return {"seconds": seconds, "processor_seconds": sum(after[:4]) - sum(before[:4]), **counts}


def main(settings: Settings) -> None:
    torch.compiler.config.force_disable_caches = True
    torch.set_num_threads(1)
    about = {"size": settings.size, "rounds": settings.rounds, "images": IMAGES, "machine": processor()}
    about |= {
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "commit": commit(),
    }
    for task in settings.tasks:
        results: dict[str, list[dict[str, float]]] = {VIT: [], OURS: []}
        for _ in range(settings.rounds + 1):
            for provider, measured in results.items():
                measured.append(measure(task, provider, settings.size))
        best = {
            provider: {name: round(min(row[name] for row in measured[1:]), 2) for name in measured[0]}
            for provider, measured in results.items()
        }
        with settings.output.open("a") as file:
            for provider, row in best.items():
                ratio = row["processor_seconds"] / best[VIT]["processor_seconds"]
                line = {"task": task, "provider": provider, **row, "of_vit": round(ratio, 2), **about}
                file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
