"""Bandwidth of the module `GroupRational` on one GPU, channels last and first, over that of a copy.

    python benchmarks/bench_group_rational.py        # a minute; adds lines to results/group_rational.jsonl

What a foreign model calls is the module, with its checks and its layout. `of_copy` is the bandwidth
of the module over that of a copy of a tensor of the same shape, in the same run. Replays of CUDA graphs are
timed, so that the host's time for a call does not count; backward is forward and backward less forward.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from bench_model import replayed
from transformers import HfArgumentParser

from flashkat_hf import GroupRational
from flashkat_hf.model.reference import rational_value
from flashkat_hf.training.summary import commit, versions

RESULTS = Path(__file__).parent / "results/group_rational.jsonl"
CASES = {  # name: shape, dimension of the channels, whether memory is laid out with the channels last
    "tokens of a ViT": ((512, 197, 768), -1, False),
    "channels first, 56 x 56": ((256, 96, 56, 56), 1, False),
    "channels first, 14 x 14": ((512, 384, 14, 14), 1, False),
    "channels first, 7 x 7": ((1024, 768, 7, 7), 1, False),
    "channels first, memory channels last": ((256, 96, 56, 56), 1, True),
}


@dataclass(frozen=True)
class Settings:
    dtypes: list[str] = field(default_factory=lambda: ["bfloat16", "float32"], metadata={"help": "of x"})
    repeats: int = field(default=5, metadata={"help": "the median of so many medians"})
    output: Path = field(default=RESULTS, metadata={"help": "file that lines are added to"})

    def __post_init__(self):
        if not torch.cuda.is_available():
            raise SystemExit("bench_group_rational.py needs a GPU")


def milliseconds(run, repeats: int) -> float:
    replay, bench = replayed(run), triton.testing.do_bench
    samples = [bench(replay, warmup=25, rep=100, return_mode="median") for _ in range(repeats)]
    return sorted(samples)[repeats // 2]


def measure(name: str, dtype: torch.dtype, repeats: int) -> list[dict]:
    """Check a case against the formula, then time its forward and backward passes, and a copy."""
    shape, dim, last = CASES[name]
    module = GroupRational(shape[dim], init="gelu", dim=dim).cuda()
    x, grad_y = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    if last:
        x, grad_y = (tensor.to(memory_format=torch.channels_last) for tensor in (x, grad_y))
    part = x[:1].movedim(dim, -1).double()
    with torch.no_grad():
        exact = rational_value(part.contiguous(), module.numerator.double(), module.denominator.double())
        made = module(x[:1]).movedim(dim, -1).double()
    torch.testing.assert_close(made, exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
    target = torch.empty_like(x)
    copied = 2 * x.nbytes / milliseconds(lambda: target.copy_(x), repeats)
    with torch.no_grad():
        forward = milliseconds(lambda: module(x), repeats)
    leaves = [x.requires_grad_(), module.numerator, module.denominator]
    backward = milliseconds(lambda: torch.autograd.grad(module(x), leaves, grad_y), repeats) - forward
    rows = []
    for direction, ms, tensors in (("forward", forward, 2), ("backward", backward, 3)):
        rate = tensors * x.nbytes / ms
        row = {
            "case": name,
            "shape": shape,
            "dtype": str(dtype).removeprefix("torch."),
            "direction": direction,
        }
        rows.append(
            row | {"ms": round(ms, 4), "gb_per_s": round(rate / 1e6), "of_copy": round(rate / copied, 3)}
        )
    return rows


def main(settings: Settings) -> None:
    torch.manual_seed(0)
    about = {"gpu": torch.cuda.get_device_name(), **versions(), "commit": commit()}
    with settings.output.open("a") as file:
        for name in CASES:
            for dtype in settings.dtypes:
                for row in measure(name, getattr(torch, dtype), settings.repeats):
                    what = f"{name:38} {dtype:9} {row['direction']:9}"
                    print(f"{what} {row['ms']:8} ms {row['of_copy']:6} of a copy")
                    file.write(json.dumps(row | about) + "\n")


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
