"""Images per second of the data side alone, in each of the ways that training batches can be made.

JPEG files like photographs are made in a temporary folder, linked several times so that an epoch is long, and
read as an image folder. Each way makes the recipe's batches, up to normalised tensors on the device, ahead in
a thread as in training; the first are not timed. A result is one JSON line.

    python benchmarks/bench_data.py --output benchmarks/results/data.jsonl
"""

import json
import os
import platform
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy
import PIL
import timm
import torch
import torchvision
from PIL import Image
from transformers import HfArgumentParser

from flashkat_hf import make_image_processor
from flashkat_hf.data import open_data
from flashkat_hf.data.augmentation import Augmentation, batch_transform, training_transform
from flashkat_hf.data.batches import TrainBatches
from flashkat_hf.data.prefetch import made_ahead, moved
from flashkat_hf.training.speed import cores

WAYS = (
    "nothing",
    "augmentation",
    "decoding",
)  # what the device does for whole batches: `Augmentation.on_device`


@dataclass(frozen=True)
class Settings:
    output: Path = field(metadata={"help": "JSON lines are written here"})
    images: int = field(default=4096, metadata={"help": "JPEG files"})
    copies: int = field(default=32, metadata={"help": "names that each file has in the folder"})
    width: int = field(default=500, metadata={"help": "of the files in pixels"})
    height: int = field(default=375, metadata={"help": "of the files in pixels"})
    quality: int = field(default=90, metadata={"help": "of the JPEG files"})
    image_size: int = field(default=224, metadata={"help": "of the batches"})
    batch_size: int = field(default=256, metadata={"help": "images"})
    warmup: int = field(default=8, metadata={"help": "batches that are not timed"})
    seconds: float = field(default=20.0, metadata={"help": "that each way is timed for"})
    workers: list[int] = field(
        default_factory=list, metadata={"help": "numbers of processes; default: one a core, half"}
    )
    ways: list[str] = field(
        default_factory=lambda: list(WAYS), metadata={"help": "nothing, augmentation, decoding"}
    )
    device: str = field(default="", metadata={"help": "default: the GPU, if there is one"})
    commit: str | None = field(default=None, metadata={"help": "of the code measured; default: asks git"})

    def __post_init__(self):
        if unknown := set(self.ways) - set(WAYS):
            raise SystemExit(f"--ways: {', '.join(sorted(unknown))} unknown; known are {', '.join(WAYS)}")
        if self.images < 2 or self.images * self.copies < self.batch_size:
            raise SystemExit(
                f"--images: {self.images} must be at least 2, with the copies a batch of {self.batch_size}"
            )


def write_photograph(size: tuple[int, int], quality: int, path: Path, seed: int) -> None:
    """Structure at every scale, as photographs have it; about 85 KB at 500 x 375 and quality 90."""
    generator, pixels = numpy.random.default_rng(seed), numpy.zeros((size[1], size[0], 3))
    for cells in (4, 12, 36, 108, 324):
        grid = generator.integers(0, 256, (cells, cells, 3), dtype=numpy.uint8)
        pixels += numpy.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC), float)
    pixels = (pixels - pixels.min()) * (255 / numpy.ptp(pixels))
    Image.fromarray(pixels.astype(numpy.uint8)).save(path, quality=quality)


def make_folder(root: Path, settings: Settings) -> None:
    paths = [root / "train" / f"class{number % 2}" / f"{number}.jpg" for number in range(settings.images)]
    paths += [root / "val" / name / "0.jpg" for name in ("class0", "class1")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    write = partial(write_photograph, (settings.width, settings.height), settings.quality)
    with ProcessPoolExecutor(cores()) as pool:
        list(pool.map(write, paths, range(len(paths)), chunksize=16))
    for path in paths[:-2]:
        for copy in range(1, settings.copies):
            os.link(path, path.with_stem(f"{path.stem}_{copy}"))


def measure(root: Path, way: str, workers: int, device: torch.device, settings: Settings) -> dict[str, float]:
    """Images per second over at least `seconds`; the device's work is waited for at the end."""
    processor, augmentation = make_image_processor(settings.image_size), Augmentation(on_device=way)
    rest = batch_transform(processor, augmentation)
    finish = rest.to(device) if rest is not None else partial(moved, device)
    batches = TrainBatches(
        open_data(root, skip_corrupt=True).train,  # their headers need no check
        training_transform(processor, augmentation),
        batch_size=settings.batch_size,
        seed=0,
        workers=workers,
        pin_memory=device.type == "cuda",
    )
    endless = (batch for epoch in range(10**6) for batch in batches.epoch(epoch))
    count, start, host_seconds = -settings.warmup, time.perf_counter(), []

    def make(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        before = time.thread_time()
        finished = finish(batch)
        host_seconds.append(time.thread_time() - before)
        return finished

    decode = getattr(rest, "decode", None)
    with closing(made_ahead(endless, make, device, workers > 0, decode)) as ahead:
        for made in ahead:
            pixels = made["pixel_values"]
            count += 1
            if count == 0:
                wait(device)
                start = time.perf_counter()
            if count > 0 and time.perf_counter() - start >= settings.seconds:
                break
        wait(device)
        seconds = time.perf_counter() - start
    if pixels.shape[1:] != (3, settings.image_size, settings.image_size) or not pixels.isfinite().all():
        raise SystemExit(f"{way}: wrong batches")
    return {
        "images_per_s": round(count * settings.batch_size / seconds, 1),
        "host_ms": round(median(host_seconds) * 1e3, 2),  # of training's own process, for a batch
        "batches": count,
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(settings: Settings) -> None:
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    about = {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "cpu_cores": cores(),
        "cpu": platform.processor() or platform.machine(),
        "file_size": f"{settings.width}x{settings.height}, quality {settings.quality}",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
        "commit": settings.commit or subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
    }
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    numbers = settings.workers or sorted({max(1, cores() // 2), cores()})
    with tempfile.TemporaryDirectory() as folder, settings.output.open("w") as lines:
        make_folder(Path(folder), settings)
        about["file_bytes"] = (Path(folder) / "train" / "class0" / "0.jpg").stat().st_size
        for way in settings.ways:
            for workers in numbers:
                case = {"on_device": way, "workers": workers, "image_size": settings.image_size}
                result = {**case, "batch_size": settings.batch_size} | measure(
                    Path(folder), way, workers, device, settings
                )
                print(json.dumps(result), flush=True)
                lines.write(json.dumps({**result, **about}) + "\n")
                lines.flush()


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
