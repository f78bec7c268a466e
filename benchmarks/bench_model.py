"""Throughput of FlashKAT beside timm's ViT of the same size: training step, inference, latency; on a GPU or a CPU.

    python benchmarks/bench_model.py --output benchmarks/results/model.jsonl                     # training step
    python benchmarks/bench_model.py --task inference --batch_sizes 256 --output ...             # bfloat16 weights
    python benchmarks/bench_model.py --task inference --modes graphs --batch_sizes 1 --output ...  # latency
    python benchmarks/bench_model.py --sizes small --batch_sizes 1 8 64 512 --output ...         # against batch size
    python benchmarks/bench_model.py --sizes small --image_sizes 224 384 512 --batch_sizes 64 --output ...
    python benchmarks/bench_model.py --device cpu --sizes tiny --batch_sizes 8 --output benchmarks/results/cpu.jsonl

A training step is forward, cross-entropy, backward and fused AdamW on synthetic images, under bfloat16 autocast on a
GPU and in float32 on a CPU. The providers take turns, step by step, so what else the machine does meets them alike. A
result is one JSON line: the median of the steps, the peak memory, the machine, the versions and the commit.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import timm
import torch
from torch.nn.functional import cross_entropy
from transformers import HfArgumentParser

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification
from flashkat_hf.modeling_flashkat import FlashKATPatchProjection

BATCH_SIZES = {"tiny": 1024, "small": 512, "base": 256}  # training step on a GPU
MODES = {"eager": None, "compiled": "default", "graphs": "reduce-overhead"}  # names of torch.compile's
LABELS, WARM_UP = 1000, 4


class Logits(torch.nn.Module):
    """A transformers classifier with timm's calling convention."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def flashkat(size: str, image_size: int) -> torch.nn.Module:
    config = FlashKATConfig.from_size(size, num_labels=LABELS, image_size=image_size)
    return Logits(FlashKATForImageClassification(config))


def vit(size: str, image_size: int) -> torch.nn.Module:
    return timm.create_model(f"vit_{size}_patch16_224", num_classes=LABELS, img_size=image_size)


def vit_matrix_patches(size: str, image_size: int) -> torch.nn.Module:
    """A ViT engineered as ours: the patch embedding as a matrix product."""
    model = vit(size, image_size)
    convolution = model.patch_embed.proj
    model.patch_embed.proj = FlashKATPatchProjection(3, convolution.out_channels, kernel_size=16, stride=16)
    return model


PROVIDERS = {"flashkat_hf": flashkat, "timm ViT": vit, "timm ViT, matrix-product patches": vit_matrix_patches}


@dataclass(frozen=True)
class Settings:
    output: Path = field(metadata={"help": "JSON lines are written here"})
    task: Literal["train", "inference"] = field(default="train", metadata={"help": "what a step is"})
    sizes: list[str] = field(default_factory=lambda: list(BATCH_SIZES), metadata={"help": ", ".join(BATCH_SIZES)})
    modes: list[str] = field(default_factory=lambda: ["compiled", "eager"], metadata={"help": ", ".join(MODES)})
    batch_sizes: list[int] | None = field(default=None, metadata={"help": "default: by the model's size"})
    image_sizes: list[int] = field(default_factory=lambda: [224], metadata={"help": "pixels"})
    steps: int = field(default=20, metadata={"help": "timed steps of each provider, after warm-up"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cuda or cpu"})
    commit: str | None = field(default=None, metadata={"help": "of the code measured; default: asks git"})

    def __post_init__(self):
        for name, known in (("sizes", BATCH_SIZES), ("modes", MODES)):
            if unknown := set(getattr(self, name)) - known.keys():
                raise SystemExit(f"--{name}: {', '.join(sorted(unknown))} unknown; known are {', '.join(known)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("--device: there is no GPU")
        if self.steps < 1:
            raise SystemExit(f"--steps: {self.steps} must be at least 1")


def make_step(
    model: torch.nn.Module, task: str, mode: str, images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """A function that makes one step, and returns the loss or the logits."""
    gpu = images.is_cuda
    if task == "inference" and gpu:
        model, images = model.bfloat16(), images.bfloat16()
    model.train(task == "train")
    run = torch.compile(model, mode=MODES[mode]) if MODES[mode] else model
    if task == "inference":
        return torch.no_grad()(lambda: run(images))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            loss = cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def milliseconds(step: Callable[[], torch.Tensor], gpu: bool) -> float:
    if not gpu:
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(settings: Settings, size: str, mode: str, image_size: int, batch_size: int) -> list[dict]:
    """One result for each provider; they take turns."""
    gpu = settings.device == "cuda"
    torch.compiler.reset()
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, image_size, image_size, device=settings.device)
    labels = torch.randint(LABELS, (batch_size,), device=settings.device)
    steps, peaks = {}, {}
    for provider, make in PROVIDERS.items():
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        step = make_step(make(size, image_size).to(settings.device), settings.task, mode, images, labels)
        for _ in range(WARM_UP):
            outcome = step()
        if not outcome.isfinite().all():
            raise SystemExit(f"{provider} {size} {mode}: the {settings.task} step gives numbers that are not finite")
        steps[provider] = step
        peaks[provider] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2) if gpu else None
    times = {provider: [] for provider in steps}
    for _ in range(settings.steps):
        for provider, step in steps.items():
            times[provider].append(milliseconds(step, gpu))
    case = {"task": settings.task, "size": size, "mode": mode, "batch_size": batch_size, "image_size": image_size}
    return [
        {
            "provider": provider,
            **case,
            "images_per_s": round(batch_size / median(times[provider]) * 1e3, 1),
            "ms": round(median(times[provider]), 3),
            "peak_gib": peaks[provider],
        }
        for provider in steps
    ]


def main(settings: Settings) -> None:
    torch.set_float32_matmul_precision("high")
    gpu = settings.device == "cuda"
    about = {
        "machine": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "precision": "bfloat16" if gpu else "float32",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "commit": settings.commit or subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
    }
    if gpu:
        import triton

        about["triton"] = triton.__version__
    else:
        about["cores"] = os.cpu_count()
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with settings.output.open("w") as lines:
        for size in settings.sizes:
            for mode in settings.modes:
                for image_size in settings.image_sizes:
                    for batch_size in settings.batch_sizes or [BATCH_SIZES[size]]:
                        for result in measure(settings, size, mode, image_size, batch_size):
                            print(json.dumps(result), flush=True)
                            lines.write(json.dumps({**result, **about}) + "\n")
                            lines.flush()


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
