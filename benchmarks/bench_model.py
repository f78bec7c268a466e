"""Training-step throughput of FlashKAT beside timm's ViT of the same size, eager and compiled; needs a GPU.

One step: forward, cross-entropy, backward and fused AdamW on synthetic 224-pixel images, bfloat16 autocast. A result is
one JSON line: the median of the steps, the peak memory, the GPU, the versions and the commit.

    python benchmarks/bench_model.py --output benchmarks/results/model.jsonl
"""

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
import triton
from transformers import HfArgumentParser

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification
from flashkat_hf.modeling_flashkat import FlashKATPatchProjection

BATCH_SIZES = {"tiny": 1024, "small": 512, "base": 256}
LABELS = 1000


class Logits(torch.nn.Module):
    """A transformers classifier with timm's calling convention."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def flashkat(size: str) -> torch.nn.Module:
    return Logits(FlashKATForImageClassification(FlashKATConfig.from_size(size, num_labels=LABELS)))


def vit(size: str) -> torch.nn.Module:
    return timm.create_model(f"vit_{size}_patch16_224", num_classes=LABELS)


def vit_matrix_patches(size: str) -> torch.nn.Module:
    """A ViT engineered as ours: the patch embedding as a matrix product."""
    model = vit(size)
    convolution = model.patch_embed.proj
    model.patch_embed.proj = FlashKATPatchProjection(3, convolution.out_channels, kernel_size=16, stride=16)
    return model


PROVIDERS = {"flashkat_hf": flashkat, "timm ViT": vit, "timm ViT, matrix-product patches": vit_matrix_patches}


@dataclass(frozen=True)
class Settings:
    output: Path = field(metadata={"help": "JSON lines are written here"})
    sizes: list[str] = field(default_factory=lambda: list(BATCH_SIZES), metadata={"help": "tiny, small, base"})
    modes: list[str] = field(default_factory=lambda: ["compiled", "eager"], metadata={"help": "compiled, eager"})
    steps: int = field(default=20, metadata={"help": "timed steps, after warm-up"})
    commit: str | None = field(default=None, metadata={"help": "of the code measured; default: asks git"})


def measure(provider: str, size: str, mode: str, steps: int) -> dict:
    """Median milliseconds of a training step, and its peak memory."""
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    model = PROVIDERS[provider](size).cuda().train()
    run = torch.compile(model) if mode == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    images = torch.randn(BATCH_SIZES[size], 3, 224, 224, device="cuda")
    labels = torch.randint(LABELS, (len(images),), device="cuda")

    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for _ in range(6):
        loss = step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    if not loss.isfinite():
        raise SystemExit(f"{provider} {size} {mode}: the loss is {loss.item()}")
    ms = sorted(start.elapsed_time(end) for start, end in times)[steps // 2]
    return {
        "images_per_s": round(len(images) / ms * 1e3, 1),
        "ms": round(ms, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def main(settings: Settings) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    torch.set_float32_matmul_precision("high")
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "timm": timm.__version__,
        "commit": settings.commit or subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
    }
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with settings.output.open("w") as lines:
        for size in settings.sizes:
            for mode in settings.modes:
                for provider in PROVIDERS:
                    case = {"provider": provider, "size": size, "mode": mode, "batch_size": BATCH_SIZES[size]}
                    result = {**case, **measure(provider, size, mode, settings.steps)}
                    print(json.dumps(result), flush=True)
                    lines.write(json.dumps({**result, **about}) + "\n")
                    lines.flush()


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
