"""Time self-attention by our kernels and by PyTorch's backends, by the number of tokens, on one GPU.

    python benchmarks/bench_attention.py --output benchmarks/results/attention.jsonl     # half a minute

All start from the product that holds q, k and v, and end with its gradient and that of its bias, as a block
needs them; PyTorch's backends are called as a block calls them (`pytorch_attention.py`). A result is the
least of the times of one call within replays of a CUDA graph: the GPU's time, without the host's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_model import Provided, refuse, results_file
from torch import Tensor
from transformers import HfArgumentParser

from flashkat_hf.model import pytorch_attention
from flashkat_hf.model.pytorch_attention import attention_backward, attention_forward
from flashkat_hf.model.triton_attention import packed_attention_backward, packed_attention_forward

HEAD_DIM, CALLS, REPLAYS = 64, 10, 20
BACKENDS = {"PyTorch, cuDNN": pytorch_attention.CUDNN, "PyTorch, flash": pytorch_attention.FLASH}


@dataclass(frozen=True, kw_only=True)
class Settings(Provided):
    tokens: list[int] = field(
        default_factory=lambda: [197, 257, 577, 785, 1025, 1370], metadata={"help": "of a sequence"}
    )
    batch_sizes: list[int] = field(default_factory=lambda: [8, 64], metadata={"help": "sequences"})
    heads: list[int] = field(default_factory=lambda: [3, 12], metadata={"help": "of 64 channels"})

    def __post_init__(self):
        super().__post_init__()
        refuse(self.device == "cpu", "--device: kernels need a GPU")


def microseconds(call: Callable[[], object]) -> float:
    """Return the least GPU time of a call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / CALLS * 1e3)
    return round(min(times), 1)


def by_ours(qkv: Tensor, grad: Tensor, heads: int, scale: float) -> tuple[Callable, Callable]:
    """Return functions that compute forward and backward by our kernels."""
    y, lse = packed_attention_forward(qkv, heads, scale)
    return (
        lambda: packed_attention_forward(qkv, heads, scale),
        lambda: packed_attention_backward(grad, qkv, y, lse, scale),
    )


def by_pytorch(
    backend: int, qkv: Tensor, grad: Tensor, heads: int, scale: float
) -> tuple[Callable, Callable]:
    """Return functions that compute forward and backward by one of PyTorch's backends."""

    def forward() -> Any:
        return attention_forward(qkv, heads, scale, backend)

    def backward() -> None:
        grad_qkv = attention_backward(grad, qkv, y, attended, heads, scale)
        torch.sum(grad_qkv.flatten(0, 1), 0, dtype=torch.float32)

    y, attended = forward()
    return forward, backward


def main(settings: Settings) -> None:
    cases = [(n, b, h) for n in settings.tokens for b in settings.batch_sizes for h in settings.heads]
    with results_file(settings) as write:
        for tokens, batch, heads in cases:
            qkv, grad = (
                torch.randn(batch, tokens, width * heads * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
                for width in (3, 1)
            )
            arguments = qkv, grad, heads, HEAD_DIM**-0.5
            ways = {"flashkat_hf": by_ours(*arguments)}
            ways |= {name: by_pytorch(backend, *arguments) for name, backend in BACKENDS.items()}
            for name, (forward, backward) in ways.items():
                result = {"tokens": tokens, "batch_size": batch, "heads": heads, "provider": name}
                times = {"forward_us": microseconds(forward), "backward_us": microseconds(backward)}
                write(result | times)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
