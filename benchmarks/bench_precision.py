"""Measure the error of the coefficients' gradients: our sums beside the original KAT kernel's.

The original adds each element's term to its coefficient in memory by an atomic addition, in float32: one long
running sum, emulated here in the order of memory (on a GPU the order changes from run to run). Ours is the
operator as users call it: on a GPU the Triton kernel's sums in registers and one reduction, on a CPU the sums
of `reference.py`. Inputs are normal, the coefficients those of the swish table with noise. A result is one
JSON line: the mean absolute error against float64 over the draws and coefficients, relative to the gradients'
mean absolute value.

    python benchmarks/bench_precision.py --output benchmarks/results/precision.jsonl  # two minutes
    python benchmarks/bench_precision.py --output benchmarks/results/precision_gpu.jsonl --peer PATH

With --peer, a folder with clones (`peers.py`), the original kernels of FlashKAT and KAT themselves run on the
GPU in place of the emulation. They get bfloat16 inputs as their own code does under autocast: converted to
float32.
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import peers
import torch
from torch import Tensor
from tqdm import trange
from transformers import HfArgumentParser

from flashkat_hf import START_TABLES, rational


@dataclass(frozen=True)
class Settings:
    output: Path = field(metadata={"help": "JSON lines are written here"})
    shape: list[int] = field(
        default_factory=lambda: [16, 197, 768], metadata={"help": "images, tokens, channels"}
    )
    draws: int = field(default=100, metadata={"help": "random inputs"})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cuda or cpu"}
    )
    peer: Path | None = field(
        default=None, metadata={"help": "folder with clones of the original repositories"}
    )
    commit: str | None = field(default=None, metadata={"help": "of the code measured; default: asks git"})


def gradients(x: Tensor, grad_y: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Return the gradients of numerator and denominator side by side, `(8, 10)` float64."""
    tables = tuple(
        table.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_() for table in tables
    )
    sums = torch.autograd.grad(rational(x, *tables), tables, grad_y)
    return torch.cat(sums, dim=1).double().cpu()


def original(rational: Callable, x: Tensor, grad_y: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Return the same gradients by an original kernel, in float32."""
    tables = tuple(table.detach().requires_grad_() for table in tables)
    sums = torch.autograd.grad(rational(x.float(), *tables), tables, grad_y.float())
    return torch.cat(sums, dim=1).double().cpu()


def running_sums(x: Tensor, grad_y: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Return the same gradients by running float32 sums, element by element in the order of memory."""
    a, b = (table.float().cpu()[:, :, None] for table in tables)
    x, grad_y = (
        tensor.float().cpu().view(-1, 8, tensor.shape[-1] // 8).transpose(0, 1) for tensor in (x, grad_y)
    )
    x, grad_y = x.flatten(1), grad_y.flatten(1)  # (8, elements)
    q = 1 + sum(b[:, k].abs() * x.abs() ** (k + 1) for k in range(4))
    f = sum(a[:, k] * x**k for k in range(6)) / q
    sign = torch.where(b < 0, -1.0, 1.0)
    terms = [grad_y / q * x**k for k in range(6)]
    terms += [-grad_y / q * f * x.abs() ** (k + 1) * sign[:, k] for k in range(4)]
    sums = [np.add.accumulate(term.numpy(), axis=1, dtype=np.float32)[:, -1] for term in terms]
    return torch.from_numpy(np.stack(sums, axis=1)).double()


def methods(peer: Path | None) -> dict[str, Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]]:
    if peer is None:
        return {"flashkat_hf": gradients, "one atomic addition an element": running_sums}
    return {"flashkat_hf": gradients} | {
        name: partial(original, peers.rational(peer, name)) for name in (peers.FLASHKAT, peers.KAT)
    }


def main(settings: Settings) -> None:
    if len(settings.shape) != 3 or settings.shape[-1] % 8 or min(settings.shape) < 1:
        raise SystemExit(
            f"--shape: {settings.shape} must be three positive numbers, the last a multiple of 8"
        )
    if settings.draws < 1:
        raise SystemExit(f"--draws: {settings.draws} must be at least 1")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: there is no GPU")
    if settings.peer is not None and settings.device == "cpu":
        raise SystemExit("--peer: the original kernels need a GPU")
    torch.manual_seed(0)
    start = START_TABLES["swish"]
    computes = methods(settings.peer)
    cases = [(dtype, method) for dtype in (torch.float32, torch.bfloat16) for method in computes]
    errors: dict[tuple, list[float]] = {case: [] for case in cases}
    for _ in trange(settings.draws, unit="draw"):
        tables = tuple(torch.tensor([row] * 8, device=settings.device) for row in start)
        tables = tuple(table + 0.1 * torch.randn_like(table) for table in tables)
        inputs = torch.randn(2, *settings.shape, device=settings.device)
        for dtype in (torch.float32, torch.bfloat16):
            x, grad_y = inputs.to(dtype)
            exact = gradients(x.double(), grad_y.double(), tables)
            for method, compute in computes.items():
                error = (compute(x, grad_y, tables) - exact).abs().mean() / exact.abs().mean()
                errors[dtype, method].append(error.item())
    about = {
        "machine": torch.cuda.get_device_name() if settings.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "commit": settings.commit or subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
    }
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with settings.output.open("w") as lines:
        for dtype, method in cases:
            samples = torch.tensor(errors[dtype, method], dtype=torch.float64)
            result = {
                "method": method,
                "dtype": str(dtype).removeprefix("torch."),
                "shape": settings.shape,
                "draws": settings.draws,
                "mean_error": samples.mean().item(),
                "largest_error": samples.max().item(),
            }
            print(json.dumps(result))
            lines.write(json.dumps({**result, **about}) + "\n")


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
