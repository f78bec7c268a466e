"""Pictures a second of `flashkat predict` from JPEG files on one GPU, beside its parts: model and decoder.

    python benchmarks/bench_predict.py --size small --batch_size 256    # adds a line to results/predict.jsonl

Files like photographs are made first. The command runs in processes of its own on some pictures and on three
times as many; the difference counts, which leaves out what happens once: imports, loading, capturing. The
model's rate is that of replays of its CUDA graph on a batch that is on the GPU, in the same precision; the
decoder's that of decoding files in pinned memory, without resizing.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_data import write_photograph
from transformers import HfArgumentParser

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification, make_image_processor
from flashkat_hf.data.augmentation import evaluation_in_batches, evaluation_transform
from flashkat_hf.data.samples import Sample
from flashkat_hf.data.workers import collate
from flashkat_hf.inference.questions import Forward
from flashkat_hf.training.speed import cores
from flashkat_hf.training.summary import commit, versions

RESULTS = Path(__file__).parent / "results/predict.jsonl"


@dataclass(frozen=True)
class Settings:
    size: str = field(default="small", metadata={"help": "tiny, small or base"})
    batch_size: int = field(default=256, metadata={"help": "pictures in a forward pass"})
    pictures: int = field(default=20_480, metadata={"help": "of the short run; the long one has three times"})
    distinct: int = field(default=512, metadata={"help": "different files, 500 x 375 pixels"})
    workers: int = field(default=0, metadata={"help": "processes that read; 0: as many as there are cores"})
    precision: str = field(default="bf16", metadata={"help": "of autocast, as accelerate names it, or no"})
    decoders: str = field(default="gpu,workers", metadata={"help": "who decodes, with commas between"})
    output: Path = field(default=RESULTS, metadata={"help": "file that a line is added to"})
    commit: str | None = field(default=None, metadata={"help": "of the code measured; default: asks git"})

    def __post_init__(self):
        if not torch.cuda.is_available():
            raise SystemExit("bench_predict.py needs a GPU")


def write_list(folder: Path, settings: Settings) -> list[Path]:
    """Write the different files, and two lists with paths of them; return the files."""
    files = [folder / f"{number}.jpg" for number in range(settings.distinct)]
    for number, path in enumerate(files):
        write_photograph((500, 375), 90, path, number)
    for name, times in (("short", 1), ("long", 3)):
        count = settings.pictures * times
        lines = [files[number % len(files)].name for number in range(count)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return files


def seconds_of_command(folder: Path, name: str, decoder: str, settings: Settings) -> float:
    command = [sys.executable, "-m", "flashkat_hf", "predict", str(folder / "model")]
    command += [str(folder / f"{name}.txt"), "-o", str(folder / f"{name}.parquet"), "--overwrite"]
    command += ["--batch-size", str(settings.batch_size), "--workers", str(settings.workers or cores())]
    command += ["--decoder", decoder, "--no-progress"]
    if settings.precision != "no":
        command.append("--mixed-precision")
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": settings.precision}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} fails:\n{done.stderr}")
    return time.perf_counter() - start


def rate(call: Callable[[], None], pictures: int, seconds: float = 5.0) -> float:
    """Return the pictures a second of a call that takes so many; it is repeated for some seconds."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
        calls += 5
    return calls * pictures / (time.perf_counter() - start)


def rates_of_parts(model: torch.nn.Module, processor: Any, files: list[Path], settings: Settings) -> dict:
    """Return the pictures a second of the model alone and of the decoder alone."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.precision)
    context = partial(torch.autocast, "cuda", dtype=dtype, enabled=dtype is not None)
    side = model.config.image_size
    pixels = torch.randn(settings.batch_size, 3, side, side, device="cuda")
    forward = Forward(model.cuda(), settings.batch_size, context)
    worker, module = evaluation_in_batches(evaluation_transform(processor))
    module = module.cuda()
    paths = [str(files[number % len(files)]) for number in range(settings.batch_size)]
    batch = collate([{**worker(Sample(path, 0, path)), "corrupt": {}} for path in paths])
    batch["pixel_values"] = batch["pixel_values"].pin_memory()  # as the command's loader does
    decode = partial(module.decode, batch)
    rates = {"model_graphed": rate(partial(forward, pixels), settings.batch_size)}
    rates["gpu_decoder"] = rate(decode, settings.batch_size)
    return {name: round(number) for name, number in rates.items()}


def main(settings: Settings) -> None:
    decoders = settings.decoders.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        config = FlashKATConfig.from_size(settings.size, num_labels=1000)
        model = FlashKATForImageClassification(config).eval()
        processor = make_image_processor(config.image_size)
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        files = write_list(folder, settings)
        row = {"size": settings.size, "batch_size": settings.batch_size, "precision": settings.precision}
        row |= {"pictures": settings.pictures, "workers": settings.workers or cores()}
        row |= rates_of_parts(model, processor, files, settings)
        torch.cuda.empty_cache()
        for decoder in decoders:
            short, long = (seconds_of_command(folder, name, decoder, settings) for name in ("short", "long"))
            row[f"predict_{decoder}"] = round(2 * settings.pictures / (long - short))
            row[f"predict_{decoder}_seconds"] = round(long, 1)
    bound = min(row["model_graphed"], row["gpu_decoder"])
    for name in ("model_graphed", "gpu_decoder", *(f"predict_{decoder}" for decoder in decoders)):
        share = row[name] / bound
        print(f"{name:18} {row[name]:8} pictures/s  {share:6.2f} of the lesser of model and decoder")
    row |= {
        "gpu": torch.cuda.get_device_name(),
        "cores": cores(),
        **versions(),
        "commit": settings.commit or commit(),
    }
    with settings.output.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
