"""Measure where a training step's time goes on a GPU: kernels by class, and ours beside their roofline.

    R=benchmarks/results
    python benchmarks/profile_step.py --append --output $R/profile.jsonl --size small
    python benchmarks/profile_step.py --append --output $R/profile.jsonl --size small --peer PATH \
        --providers "FlashKAT, original"

A provider's step is timed as in `bench_model.py` (`wall_ms`) and then traced for a few steps. A result is one
JSON line for each kernel and provider, milliseconds and calls of one step, and one called "total". A kernel
of ours also has the time that it cannot go below, `floor_ms`: what it must move, at the bandwidth of a large
copy in the same run, or what it must multiply, at the speed of a large bfloat16 matrix product, whichever
takes longer.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from bench_model import (
    BATCH_SIZES,
    LARGEST_BATCH,
    MODES,
    Provided,
    alone,
    beside_others,
    refuse,
    refuse_unknown,
    results_file,
    together,
    warm_step,
)
from gpu_trace import chrome_trace, gpu_events
from torch.profiler import ProfilerActivity
from transformers import HfArgumentParser

from flashkat_hf.model.configuration_flashkat import SIZES

IMAGE_SIZE, TOKENS, SHOWN = 224, 197, 110

# The first pattern that a kernel's name holds says its class. What torch.compile generates (triton_poi, _red,
# _per) is named after all that it fuses, so only a layer norm in it counts. Our norm kernels count as norm,
# act1 in them too.
CLASSES = (
    ("matrix products", r"^rational_mlp_forward"),  # with act2 in it
    ("norm", r"add_norm_rational"),  # with act1 in it
    ("rational", r"rational|gather_(block_)?sums"),
    ("norm", r"^triton_(poi|red|per)_.*layer_norm"),
    ("pointwise and reductions", r"^triton_(poi|red|per)_|^scale_samples"),
    ("attention", r"attention|sdpa|flash|fmha|dot_do_o|convert_dq"),
    ("optimiser", r"FusedAdam|FusedOptimizer|multi_tensor_apply"),
    ("matrix products", r"nvjet|gemm|cutlass|cublas|splitK|^triton_tem|conv(?!ert)|[wd]grad|xmma"),
    ("norm", r"norm|GammaBeta"),
    ("pointwise and reductions", r"^triton_|at::native|elementwise|[rR]educe|softmax"),
)
OTHER = "other"


class Traffic(NamedTuple):
    """Numbers that a kernel must move and multiply for a token, less tables and partial sums."""

    hidden: int = 0  # numbers of two bytes (bfloat16) for each channel of the residual stream
    intermediate: int = 0  # the same for each channel between the MLP's linear maps
    row: int = 0  # float32 numbers for each token
    head: int = 0  # float32 numbers for each token and head
    products: int = 0  # products of (tokens, tokens) with (tokens, head_dim), or as costly, for each head
    maps: int = 0  # linear maps between the channels of the residual stream and those of the MLP


TRAFFIC = {
    "rational_forward_kernel": Traffic(intermediate=2),  # x; y
    "rational_backward_kernel": Traffic(intermediate=3),  # grad_y, x; grad_x
    "rational_mlp_backward_kernel": Traffic(intermediate=4),  # grad_y, x; grad_x, y
    "rational_mlp_forward_kernel": Traffic(hidden=1, intermediate=2, maps=1),  # x; product, y
    "add_norm_rational_forward_kernel": Traffic(hidden=4, row=2),  # residual, branch; total, y; mean, rstd
    # grad_total, grad_y, total; grad; mean, rstd; with stochastic depth also grad_branch
    "add_norm_rational_backward_kernel": Traffic(hidden=4, row=2),
    "scale_samples_kernel": Traffic(hidden=3),  # residual, branch; y. It reads no residual in backward
    "norm_forward_kernel": Traffic(hidden=2, row=2),  # x; y; mean, rstd
    "norm_backward_kernel": Traffic(hidden=4, row=2),  # grad_x, grad_y, x; grad; mean, rstd
    "packed_attention_forward_kernel": Traffic(hidden=4, head=1, products=2),  # q, k, v; y; lse
    # also y and lse; grad_q, statistics
    "packed_attention_queries_kernel": Traffic(hidden=6, head=3, products=3),
    # q, k, v, grad_y; two gradients; statistics
    "packed_attention_keys_kernel": Traffic(hidden=6, head=2, products=4),
    **dict.fromkeys(("resize_width_kernel", "resize_height_kernel"), Traffic()),  # of the data side
    **dict.fromkeys(("level_tables_kernel", "operations_kernel", "normalize_kernel"), Traffic()),  # likewise
    **dict.fromkeys(("gather_sums_kernel", "gather_block_sums_kernel"), Traffic()),  # partial sums: a few MB
}


@dataclass(frozen=True, kw_only=True)
class Settings(Provided):
    size: str = field(default="small", metadata={"help": ", ".join(BATCH_SIZES)})
    mode: str = field(default="compiled", metadata={"help": ", ".join(MODES)})
    batch_size: int | None = field(default=None, metadata={"help": "default: by the model's size"})
    steps: int = field(default=3, metadata={"help": "traced, after warm-up"})

    def __post_init__(self):
        super().__post_init__()
        refuse_unknown("--size", [self.size], BATCH_SIZES)
        refuse_unknown("--mode", [self.mode], MODES)
        refuse(self.steps < 1, f"--steps: {self.steps} must be at least 1")
        refuse(
            self.batch_size is not None and self.batch_size < 1,
            f"--batch_size: {self.batch_size} must be positive",
        )
        refuse(self.device == "cpu", "--device: a profile of kernels needs a GPU")


def kernel_class(name: str) -> str:
    return next((label for label, pattern in CLASSES if re.search(pattern, name)), OTHER)


def short_name(name: str) -> str:
    """Return a kernel's name without a leading `void`, namespaces and long template arguments."""
    name = name.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
    return name[:SHOWN]


def kernel_times(trace: dict, steps: int) -> list[dict]:
    """Return calls and milliseconds of a step for each kernel in a trace of several, slowest first."""
    calls, microseconds = Counter(), defaultdict(float)
    for event in gpu_events(trace):
        calls[event["name"]] += 1
        microseconds[event["name"]] += event["dur"]
    return [
        {
            "kernel": short_name(name),
            "class": kernel_class(name),
            "calls": round(calls[name] / steps, 2),
            "ms": round(microseconds[name] / steps / 1e3, 4),
        }
        for name in sorted(calls, key=microseconds.__getitem__, reverse=True)
    ]


def work(kernel: str, size: str, batch_size: int) -> tuple[int, int] | None:
    """Return the bytes and operations that one call needs, or None for a kernel that the table lacks."""
    traffic = TRAFFIC.get(re.sub(r"_\d+$", "", kernel))  # torch.compile numbers the kernels that it sees
    if traffic is None:
        return None
    shape, tokens = SIZES[size], batch_size * TOKENS
    halves = traffic.hidden * shape["hidden_size"] + traffic.intermediate * shape["intermediate_size"]
    floats = traffic.row + traffic.head * shape["num_attention_heads"]
    factors = traffic.products * TOKENS + traffic.maps * shape["intermediate_size"]
    return tokens * (2 * halves + 4 * floats), tokens * 2 * factors * shape["hidden_size"]


def product_speed() -> float:
    """Operations per second of a large bfloat16 matrix product."""
    import triton

    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / (triton.testing.do_bench(lambda: a @ b, return_mode="median") * 1e-3)


def traced(step: Callable[[], torch.Tensor], steps: int) -> dict:
    """Return a Chrome trace of the GPU's side of several steps."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return chrome_trace(profiler)


def main(settings: Settings) -> None:
    from bench_rational import copy_bandwidth  # needs triton

    torch.set_float32_matmul_precision("high")
    with results_file(settings) as write:
        with alone(settings):
            copy, speed = copy_bandwidth(repeats=3), product_speed()
        rates = {"copy_gb_per_s": round(copy / 1e9, 1), "product_tflops": round(speed / 1e12, 1)}
        for provider in settings.chosen():
            torch.compiler.reset()
            torch.cuda.empty_cache()
            batch_size = settings.batch_size or BATCH_SIZES[settings.size]
            batch_size = min(batch_size, LARGEST_BATCH.get(provider, batch_size))
            make = settings.makers()[provider]
            with beside_others(settings):
                step = warm_step(
                    make, "train", settings.size, settings.mode, batch_size, IMAGE_SIZE, settings.device
                )
            with alone(settings):
                [wall] = together(step, turn=10)
                kernels = kernel_times(traced(step, settings.steps), settings.steps)
            refuse(not kernels, f"{provider}: the profiler saw no kernels")
            case = {
                "provider": provider,
                "task": "train",
                "size": settings.size,
                "mode": settings.mode,
                "batch_size": batch_size,
                "image_size": IMAGE_SIZE,
            }
            total = round(sum(kernel["ms"] for kernel in kernels), 3)
            calls = round(sum(kernel["calls"] for kernel in kernels), 2)
            whole = {
                "kernel": "total",
                "class": "total",
                "calls": calls,
                "ms": total,
                "wall_ms": round(wall, 3),
            }
            write(case | whole | rates)
            for kernel in kernels:
                if needed := work(kernel["kernel"], settings.size, batch_size):
                    floors = needed[0] / copy, needed[1] / speed
                    kernel["bytes"], kernel["operations"] = needed
                    kernel["floor_ms"] = round(max(floors) * 1e3 * kernel["calls"], 4)
                write(case | kernel)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
