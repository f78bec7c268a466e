"""Measure the bandwidth of the rational beside PyTorch's GELU and the compiled reference; it needs a GPU.

Each provider is checked against the float64 reference before it is timed. A result is one JSON line with the
GPU, the versions and the commit; `of_copy` is its bandwidth over that of a large device copy in the same run.

    python benchmarks/bench_rational.py --output benchmarks/results/rational.jsonl
    python benchmarks/bench_rational.py --output benchmarks/results/rational.jsonl --peer PATH

With --peer, a folder with clones (`peers.py`), the original FlashKAT's kernels are measured too: in float32
alone, which they compute in and return, under autocast as well.
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import peers
import torch
import triton
from torch import Tensor
from transformers import HfArgumentParser

from flashkat_hf import rational
from flashkat_hf.model.coefficients import start_table
from flashkat_hf.model.reference import rational_decomposed, rational_gradients, rational_value

PROVIDERS: dict[str, Callable] = {
    "flashkat_hf": rational,
    "torch.compile of the formula": torch.compile(rational_decomposed, dynamic=False),
    "GELU (PyTorch)": lambda x, numerator, denominator: torch.nn.functional.gelu(x),
}
TOKENS = 197


@dataclass(frozen=True)
class Settings:
    output: Path = field(metadata={"help": "JSON lines are written here"})
    batch_size: int = field(default=1024, metadata={"help": "images of 197 tokens"})
    channels: list[int] = field(default_factory=lambda: [768, 3072], metadata={"help": "channels of x"})
    dtypes: list[str] = field(
        default_factory=lambda: ["bfloat16", "float32"], metadata={"help": "dtypes of x"}
    )
    repeats: int = field(default=5, metadata={"help": "the median of so many medians"})
    peer: Path | None = field(default=None, metadata={"help": "folder with a clone of the original FlashKAT"})
    commit: str | None = field(default=None, metadata={"help": "of the code measured; default: asks git"})


def median_ms(run: Callable, repeats: int) -> float:
    samples = [triton.testing.do_bench(run, warmup=25, rep=100, return_mode="median") for _ in range(repeats)]
    return sorted(samples)[repeats // 2]


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second that a copy of 4 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source), repeats) * 1e-3)


def swish_tables() -> tuple[Tensor, Tensor]:
    """Coefficients of one swish table, with noise so that no group is like another."""
    table = start_table("swish")
    numerator = torch.tensor([table.numerator], device="cuda")
    denominator = torch.tensor([table.denominator], device="cuda").repeat(8, 1)
    return numerator + 0.01 * torch.randn_like(numerator), denominator + 0.01 * torch.randn_like(denominator)


def check(provider: str, dtype: torch.dtype) -> None:
    """Refuse to time a wrong answer: value and gradients on a small input against float64."""
    if provider.startswith("GELU"):
        return
    x, grad_y = (torch.randn(64, TOKENS, 768, device="cuda").to(dtype) for _ in range(2))
    leaves = [tensor.requires_grad_() for tensor in (x, *swish_tables())]
    y = PROVIDERS[provider](*leaves)
    gradients = torch.autograd.grad(y, leaves, grad_y)
    doubles = [leaf.detach().double() for leaf in leaves]
    exact = [rational_value(*doubles), *rational_gradients(grad_y.double(), *doubles)]
    # A few roundings to dtype, or float32 arithmetic: the original computes powers instead of Horner's rule
    tolerance = 1e-4 if provider == peers.FLASHKAT else max(4 * torch.finfo(dtype).eps, 1e-5)
    for actual, expected in zip((y.detach(), *gradients[:1]), exact[:2], strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    for actual, expected in zip(gradients[1:], exact[2:], strict=True):
        torch.testing.assert_close(
            actual.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
        )


def measure(provider: str, channels: int, dtype: torch.dtype, settings: Settings) -> dict[str, float]:
    """Milliseconds of the forward pass and of the backward pass alone."""
    torch.compiler.reset()  # each shape and dtype compiles anew, and meets no limit on recompiling
    x, grad_y = (
        torch.randn(settings.batch_size, TOKENS, channels, device="cuda").to(dtype) for _ in range(2)
    )
    leaves = [tensor.requires_grad_() for tensor in (x, *swish_tables())]
    run = partial(PROVIDERS[provider], *leaves)
    with torch.no_grad():
        forward = median_ms(run, settings.repeats)
    y, inputs = run(), leaves[:1] if provider.startswith("GELU") else leaves
    backward = median_ms(lambda: torch.autograd.grad(y, inputs, grad_y, retain_graph=True), settings.repeats)
    return {"forward": forward, "backward": backward}


def main(settings: Settings) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    if settings.peer is not None:
        PROVIDERS[peers.FLASHKAT] = peers.rational(settings.peer, peers.FLASHKAT)
    torch.manual_seed(0)
    commit = settings.commit or subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    copy = copy_bandwidth(settings.repeats)
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "copy_gb_per_s": round(copy / 1e9, 1),
    }
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with settings.output.open("w") as lines:
        for dtype in (getattr(torch, name) for name in settings.dtypes):
            for provider in PROVIDERS:
                if provider == peers.FLASHKAT and dtype != torch.float32:
                    continue
                check(provider, dtype)
                for channels in settings.channels:
                    for direction, ms in measure(provider, channels, dtype, settings).items():
                        # read x, write y; read x and grad_y, write grad_x
                        tensors = 2 if direction == "forward" else 3
                        num_bytes = tensors * settings.batch_size * TOKENS * channels * dtype.itemsize
                        result = {
                            "provider": provider,
                            "direction": direction,
                            "dtype": str(dtype).removeprefix("torch."),
                            "shape": [settings.batch_size, TOKENS, channels],
                            "ms": round(ms, 4),
                            "gb_per_s": round(num_bytes / ms / 1e6, 1),
                            "of_copy": round(num_bytes / (ms * 1e-3) / copy, 3),
                        }
                        print(json.dumps(result), flush=True)
                        lines.write(json.dumps({**result, **about}) + "\n")


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
