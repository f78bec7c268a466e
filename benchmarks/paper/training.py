"""Figure 1 and table 4: forward pass, backward pass and whole training step of ViT, KAT, FlashKAT and ours.

A step is forward, cross-entropy, backward and fused AdamW on synthetic images under bfloat16 autocast, with
no data loading. KAT and FlashKAT are timm's ViT with the activations of each MLP replaced: a rational before
each linear map, by algorithm 1 or 2 in float32 as the originals have it.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from itertools import product
from statistics import mean
from typing import Any

import bench_model
import peers
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flashkat_hf import START_TABLES, FlashKATConfig, FlashKATForImageClassification

from . import triton_algorithms
from .kernels import Write, interval
from .published import GROUPS
from .settings import Settings

VIT, KAT, FLASHKAT, OURS = "ViT", "KAT", "FlashKAT", "ours"
BATCH_SIZE, WARM_UP = 1024, 5
SLOW = {"batch_size": 32, "passes": 5, "warm_up": 2}  # of algorithm 1, a second each
TOY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TOY_PIXELS, TOY_BATCH, LABELS = 32, 2, bench_model.LABELS


@cache
def operator(algorithm: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return one of the paper's algorithms as an operator that autograd and `torch.compile` know."""
    backward = getattr(triton_algorithms, algorithm)
    forward = torch.library.custom_op(f"paper::{algorithm}", mutates_args=())(value)
    gradients = torch.library.custom_op(f"paper::{algorithm}_backward", mutates_args=())(
        gradients_by(backward)
    )
    forward.register_fake(lambda x, numerator, denominator: torch.empty_like(x))
    gradients.register_fake(lambda grad_y, *arguments: tuple(torch.empty_like(each) for each in arguments))
    forward.register_autograd(
        lambda ctx, grad_y: gradients(grad_y, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return getattr(torch.ops.paper, algorithm).default


def value(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    return triton_algorithms.forward(x.contiguous(), numerator.contiguous(), denominator.contiguous())


def gradients_by(backward: Callable) -> Callable:
    def run(
        grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backward(*(each.contiguous() for each in (grad_y, x, numerator, denominator)))

    return run


class Rational(nn.Module):
    """A rational in float32, with one numerator for all groups, as the released models have it."""

    def __init__(self, algorithm: str, table: str):
        super().__init__()
        self.apply_rational = operator(algorithm)
        numerator, denominator = START_TABLES[table]
        self.numerator = nn.Parameter(torch.tensor([numerator]))
        self.denominator = nn.Parameter(torch.tensor([denominator] * GROUPS))

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_rational(x.float(), self.numerator.repeat(GROUPS, 1), self.denominator)


def vit(size: str, pixels: int) -> nn.Module:
    if size != "toy":
        return bench_model.vit(size, pixels)
    shape = {"embed_dim": TOY["hidden_size"], "depth": 1, "num_heads": 2, "mlp_ratio": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=LABELS, img_size=pixels, **shape)


def kat(algorithm: str, size: str, pixels: int) -> nn.Module:
    model: Any = vit(size, pixels)
    for block in model.blocks:
        block.mlp = nn.Sequential(
            Rational(algorithm, "identity"), block.mlp.fc1, Rational(algorithm, "swish"), block.mlp.fc2
        )
    return model


def ours(size: str, pixels: int) -> nn.Module:
    if size != "toy":
        return bench_model.flashkat(size, pixels)
    config = FlashKATConfig(**TOY, num_labels=LABELS, image_size=pixels)
    return bench_model.Logits(FlashKATForImageClassification(config))


def makers(settings: Settings) -> dict[str, Callable[[str, int], nn.Module]]:
    models = {
        VIT: vit,
        KAT: partial(kat, "algorithm1"),
        FLASHKAT: partial(kat, "algorithm2"),
        OURS: ours,
    }
    if settings.peer is not None:
        models |= {
            name: partial(peers.make, settings.peer, name, num_labels=LABELS) for name in peers.SOURCES
        }
    return models


class Clock:
    """Points in time on the GPU, or on the host where there is none."""

    def __init__(self, gpu: bool):
        self.gpu, self.points = gpu, []

    def mark(self) -> None:
        if self.gpu:
            self.points.append(torch.cuda.Event(enable_timing=True))
            self.points[-1].record()
        else:
            self.points.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Return the time from each point to the next."""
        pairs = zip(self.points, self.points[1:], strict=False)
        if not self.gpu:
            return [(end - start) * 1e3 for start, end in pairs]
        self.points[-1].synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def time_steps(
    model: nn.Module, mode: str, batch_size: int, pixels: int, device: str, passes: int, warm_up: int
) -> dict[str, list[float]]:
    """Return milliseconds of the forward pass, the backward pass and the whole step, each time."""
    gpu = device == "cuda"
    images = torch.randn(batch_size, 3, pixels, pixels, device=device)
    labels = torch.randint(LABELS, (batch_size,), device=device)
    model = model.to(device).train()
    run = torch.compile(model) if mode == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step(clock: Clock) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=gpu):
            loss = cross_entropy(run(images), labels)
        clock.mark()
        loss.backward()
        clock.mark()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.mark()
        return loss.detach()

    for _ in range(warm_up):
        loss = step(Clock(gpu))
    bench_model.refuse(not loss.isfinite(), "the loss is not finite")
    clock = Clock(gpu)
    clock.mark()
    for _ in range(passes):
        step(clock)
    times = clock.milliseconds()
    forward, backward, update = times[0::3], times[1::3], times[2::3]
    steps = [sum(parts) for parts in zip(forward, backward, update, strict=True)]
    return {"forward": forward, "backward": backward, "step": steps}


def measure(settings: Settings, write: Write, attempt: Callable[[str], AbstractContextManager]) -> None:
    """Write a result for each model; KAT is not compiled, since its step is its kernel."""
    modes = [mode for mode in settings.modes if mode == "eager" or "table4" in settings.names]
    if settings.toy:
        modes = ["eager"]
    for mode, size, name in product(modes, ["toy"] if settings.toy else settings.sizes, makers(settings)):
        slow = name in (KAT, peers.KAT)
        if mode == "eager" or not slow:
            with attempt(f"{name}, {size}, {mode}"):
                write(measured(settings, name, size, mode, SLOW if slow else {}))


def measured(settings: Settings, name: str, size: str, mode: str, slow: dict) -> dict:
    """Return the result of one model, at the largest batch that fits."""
    batch_size = TOY_BATCH if settings.toy else slow.get("batch_size", BATCH_SIZE)
    passes = min(slow.get("passes", settings.passes), settings.passes)
    warm_up = 1 if settings.toy else slow.get("warm_up", WARM_UP)
    pixels = TOY_PIXELS if settings.toy else 224
    gpu = settings.device == "cuda"
    while True:
        torch.manual_seed(0)
        torch.compiler.reset()
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            model = makers(settings)[name](size, pixels)
            times = time_steps(model, mode, batch_size, pixels, settings.device, passes, warm_up)
            break
        except torch.OutOfMemoryError:
            bench_model.refuse(batch_size < 2, "the memory does not hold one image")
            batch_size //= 2
    rates = [batch_size / step * 1e3 for step in times["step"]]
    result = {"what": "training", "provider": name, "size": size, "mode": mode, "batch_size": batch_size}
    result |= {"image_size": pixels, "passes": passes, "warm_up": warm_up}
    for part, values in times.items():
        result |= {f"{part}_ms": round(mean(values), 3), f"{part}_interval": round(interval(values), 4)}
    result |= {"images_per_s": round(mean(rates), 2), "images_interval": round(interval(rates), 3)}
    return result | {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None}
