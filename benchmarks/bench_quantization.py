r"""Time of a FlashKAT with torchao's quantised linear maps, beside bfloat16, on one GPU; it needs torchao.

    pip install torchao
    python benchmarks/bench_quantization.py --size small        # results/quantization.jsonl
    python benchmarks/bench_quantization.py --model runs/digits/best --accuracy true \
        --output benchmarks/results/quantization_accuracy.jsonl         # on a CPU, too; once for each model

Each way runs eagerly and compiled block by block (accelerate's `compile_regions`; the whole model at once
would take half a minute for each case). `difference` is how far the logits are from those of bfloat16. With
`--accuracy` the top-1 accuracy on the digits' test images is compared, and nothing is timed.
"""

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import compile_regions
from torch import nn
from transformers import HfArgumentParser

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification
from flashkat_hf.checkpoints.loading import load_checkpoint
from flashkat_hf.data import open_data
from flashkat_hf.data.augmentation import evaluation_transform
from flashkat_hf.data.samples import open_image
from flashkat_hf.training.summary import commit, versions

RESULTS = Path(__file__).parent / "results/quantization.jsonl"
PLAIN = "bfloat16"
WAYS = {  # name: torchao's configuration
    "int8 weights": "Int8WeightOnlyConfig",
    "int8 dynamic": "Int8DynamicActivationInt8WeightConfig",
    "float8 weights": "Float8WeightOnlyConfig",
    "float8 dynamic": "Float8DynamicActivationFloat8WeightConfig",
}


@dataclass(frozen=True)
class Settings:
    size: str = field(default="small", metadata={"help": "tiny, small or base"})
    model: str | None = field(default=None, metadata={"help": "folder or Hub id, in place of a random one"})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32, 256], metadata={"help": "images at once"})
    ways: list[str] = field(
        default_factory=lambda: [PLAIN, *WAYS], metadata={"help": f"{PLAIN}, or of quantising"}
    )
    compiled: bool = field(default=True, metadata={"help": "measure by torch.compile, too"})
    accuracy: bool = field(default=False, metadata={"help": "compare the accuracy on the digits instead"})
    output: Path = field(default=RESULTS, metadata={"help": "file that lines are added to"})
    commit: str | None = field(default=None, metadata={"help": "of the code measured; default: asks git"})

    def __post_init__(self):
        if unknown := set(self.ways) - {PLAIN, *WAYS}:
            raise SystemExit(f"--ways: {', '.join(unknown)}: there are {', '.join([PLAIN, *WAYS])}")
        if self.accuracy and self.model is None:
            raise SystemExit("--accuracy needs --model, one that knows the digits")
        if not self.accuracy and not torch.cuda.is_available():
            raise SystemExit("speed is measured on a GPU")


def quantised(model: nn.Module, way: str) -> nn.Module:
    """Return a copy of a model whose layers' linear maps are quantised."""
    import torchao.quantization as quantization

    model = copy.deepcopy(model)
    quantization.quantize_(model.get_submodule("flashkat.layers"), getattr(quantization, WAYS[way])())
    return model


@torch.no_grad()
def milliseconds(model: Any, pixels: torch.Tensor, seconds: float = 1.0) -> float:
    """Return the median time of a forward pass."""
    for _ in range(5):
        model(pixels)
    torch.cuda.synchronize()
    times, stop = [], time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        model(pixels)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return round(sorted(times)[len(times) // 2] * 1e3, 3)


@torch.no_grad()
def correct(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the percentage of images that a model names rightly."""
    guesses = torch.cat([model(part).logits.argmax(-1) for part in pixels.split(128)])
    return (guesses == labels).double().mean().item() * 100


def compare_accuracy(model: nn.Module, processor: Any, settings: Settings) -> list[dict]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    test, transform = open_data("digits").test, evaluation_transform(processor)
    samples = [test[index] for index in range(len(test))]
    pixels = torch.stack([transform(open_image(sample.image, sample.name)) for sample in samples]).to(device)
    labels = torch.tensor([sample.label for sample in samples]).to(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, pixels = model.to(device, dtype), pixels.to(dtype)
    rows = [{"way": str(dtype).removeprefix("torch."), "top1": correct(model, pixels, labels)}]
    for way in [way for way in settings.ways if way != PLAIN]:
        try:
            rows.append({"way": way, "top1": correct(quantised(model, way), pixels, labels)})
        except (AssertionError, NotImplementedError, RuntimeError) as error:  # float8 needs a GPU that has it
            print(f"{way}: {str(error).strip().splitlines()[0][:120]}")
    for row in rows:
        row |= {"device": device, "loss_in_points": round(rows[0]["top1"] - row["top1"], 2)}
        print(f"{row['way']:16} {row['top1']:6.2f}%")
    return rows


def measure(model: nn.Module, settings: Settings) -> Iterator[dict]:
    model = model.to("cuda", torch.bfloat16)
    side = model.get_submodule("flashkat").config.image_size  # pyright: ignore[reportAttributeAccessIssue]
    for way in settings.ways:
        own = model if way == PLAIN else quantised(model, way)
        for batch in settings.batch_sizes:
            torch.manual_seed(batch)
            pixels = torch.randn(batch, 3, side, side, device="cuda", dtype=torch.bfloat16)
            with torch.no_grad():
                plain, logits = (each(pixels).logits.float() for each in (model, own))
            difference = ((logits - plain).norm() / plain.norm()).item()
            row = {"way": way, "batch_size": batch, "difference": float(f"{difference:.2g}")}
            row["eager_ms"] = milliseconds(own, pixels)
            if settings.compiled:
                torch.compiler.reset()
                row["compiled_ms"] = milliseconds(compile_regions(own), pixels)
            print(json.dumps(row), flush=True)
            yield row


def main(settings: Settings) -> None:
    torch.manual_seed(0)
    if settings.model:
        model, processor = load_checkpoint(settings.model)
    else:
        config = FlashKATConfig.from_size(settings.size, num_labels=1000)
        model, processor = FlashKATForImageClassification(config), None
    model = model.eval()
    rows = compare_accuracy(model, processor, settings) if settings.accuracy else measure(model, settings)
    about = {"model": settings.model or settings.size, **versions(), "torchao": version("torchao")}
    about["commit"] = settings.commit or commit()
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    with settings.output.open("a") as file:
        for row in rows:
            file.write(json.dumps(row | about) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
