"""Images per second of JPEG decoders on one GPU, alone and beside the matrix products of a training step.

Files like photographs are made first. Each decoder takes 64 at a time, as training does, and its pictures are
compared with libjpeg's before it is timed. What is not installed is skipped, with a line that says so. A
result is one JSON line: `host_ms` is the processor time of the thread that decodes, `cpu_ms` that of all
threads but the one with the products, both for 256 images.

    pip install torchcodec "nvidia-nvimgcodec-cu13[nvjpeg]"
    python benchmarks/bench_decoding.py --output benchmarks/results/decoding.jsonl
"""

import importlib
import importlib.metadata
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from bench_data import write_photograph
from transformers import HfArgumentParser

from flashkat_hf.data.gpu.decoding import FILES, TorchvisionDecoder, crop_images
from flashkat_hf.data.gpu.nvjpeg import HardwareDecoder
from flashkat_hf.data.gpu.records import Crops, DecodedImages, Decoder, EncodedFiles
from flashkat_hf.messages import one_line
from flashkat_hf.training.speed import cores
from flashkat_hf.training.summary import commit, versions

BATCH = 256  # images that host_ms and cpu_ms are for
PRODUCT = 4096  # rows and columns of the matrices
LARGEST_ERROR = 5.0  # levels in the mean: nvJPEG enlarges quartered chroma otherwise than libjpeg
PACKAGES = ("torchvision", "torchcodec", "nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12")


class TorchcodecDecoder:
    """torchcodec's `decode_jpeg`, the successor of torchvision's."""

    def __init__(self, device: torch.device):
        self.device = device
        self.decode = importlib.import_module("torchcodec.decoders").decode_jpeg

    def __call__(self, files: EncodedFiles) -> DecodedImages:
        return DecodedImages.of(self.decode(files.parts(), mode="RGB", device=self.device))


class NvImageCodecDecoder:
    """NVIDIA's nvImageCodec, with all the backends that it finds."""

    def __init__(self, device: torch.device):
        self.device = device
        self.codec = importlib.import_module("nvidia.nvimgcodec")
        self.decoder = self.codec.Decoder(device_id=torch.cuda.current_device())
        planar = self.codec.SampleFormat.P_RGB
        self.params = self.codec.DecodeParams(apply_exif_orientation=False, sample_format=planar)

    def __call__(self, files: EncodedFiles) -> DecodedImages:
        streams = [self.codec.CodeStream(part.numpy()) for part in files.parts()]
        stream = torch.cuda.current_stream(self.device).cuda_stream
        images = self.decoder.decode(streams, params=self.params, cuda_stream=stream)
        if any(image is None for image in images):
            raise RuntimeError("nvImageCodec refused a file")
        return DecodedImages.of([torch.from_dlpack(image).contiguous() for image in images])


DECODERS: dict[str, Callable[[torch.device], Decoder]] = {
    "nvjpeg": HardwareDecoder,  # what training uses
    "torchvision": TorchvisionDecoder,  # for files that it refuses
    "torchcodec": TorchcodecDecoder,
    "nvimgcodec": NvImageCodecDecoder,
}


@dataclass(frozen=True)
class Settings:
    output: Path = field(metadata={"help": "JSON lines are written here"})
    files: int = field(default=512, metadata={"help": "JPEG files, a multiple of 64"})
    width: int = field(default=500, metadata={"help": "of the files in pixels"})
    height: int = field(default=375, metadata={"help": "of the files in pixels"})
    quality: int = field(default=90, metadata={"help": "of the JPEG files"})
    seconds: float = field(default=4.0, metadata={"help": "that each measurement takes"})
    decoders: list[str] = field(
        default_factory=lambda: list(DECODERS), metadata={"help": ", ".join(DECODERS)}
    )

    def __post_init__(self):
        if unknown := set(self.decoders) - DECODERS.keys():
            known = ", ".join(DECODERS)
            raise SystemExit(f"--decoders: {', '.join(sorted(unknown))} unknown; known are {known}")
        if self.files < FILES or self.files % FILES:
            raise SystemExit(f"--files: {self.files} must be a multiple of {FILES}")
        if not torch.cuda.is_available():
            raise SystemExit("bench_decoding.py needs a GPU: it measures decoders on one")


def make_files(settings: Settings) -> list[EncodedFiles]:
    """Return groups of files in pinned memory, as many in each as training decodes at once."""
    write = partial(write_photograph, (settings.width, settings.height), settings.quality)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(cores()) as pool:
        paths = [Path(folder, f"{number}.jpg") for number in range(settings.files)]
        list(pool.map(write, paths, range(len(paths)), chunksize=16))
        contents = [path.read_bytes() for path in paths]
    lengths = torch.tensor([len(content) for content in contents])
    height, width, plain = (torch.full_like(lengths, n) for n in (settings.height, settings.width, 1))
    data = torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8).pin_memory()
    files = EncodedFiles(lengths.cumsum(0) - lengths, lengths, height, width, plain, data)
    return [files[numbers] for numbers in torch.arange(settings.files).split(FILES)]


def check(decoder: Decoder, files: EncodedFiles) -> None:
    """Raise RuntimeError if a decoder's pictures are not libjpeg's; a wrong answer is never timed."""
    expected = TorchvisionDecoder(torch.device("cpu"))(files).memory
    zero, size = torch.zeros_like(files.start), (int(files.height[0]), int(files.width[0]))
    pixels = crop_images(decoder(files), Crops(zero, zero, files.height, files.width, zero, zero), size)
    error = (pixels.cpu().float() - torch.stack(expected)).abs().mean().item()
    if error > LARGEST_ERROR:
        raise RuntimeError(f"its pictures are {error:.1f} levels from libjpeg's")


@contextmanager
def products(device: torch.device, running: bool) -> Iterator[list[float]]:
    """Multiply matrices from another thread; yields the number of products and the thread's seconds."""
    counts, stop = [0.0, 0.0], threading.Event()

    def multiply() -> None:
        x = torch.randn(PRODUCT, PRODUCT, device=device, dtype=torch.bfloat16)
        events = [torch.cuda.Event() for _ in range(2)]
        for number in range(10**9):
            events[number % 2].synchronize()  # one group of products waits while another runs
            for _ in range(8):
                x @ x
            events[number % 2].record()
            counts[:] = counts[0] + 8, time.thread_time()
            if stop.is_set():
                return

    thread = threading.Thread(target=multiply)
    if running:
        thread.start()
    try:
        yield counts
    finally:
        stop.set()
        if running:
            thread.join()


def measure(decoder: Decoder, groups: list[EncodedFiles], beside: bool, seconds: float) -> dict[str, float]:
    device = torch.device("cuda", torch.cuda.current_device())
    stream = torch.cuda.Stream(device, priority=-1)  # as training decodes
    with products(device, beside) as counts, torch.cuda.stream(stream):
        for files in groups:  # not timed: memory and streams are made
            decoder(files)
        stream.synchronize()
        before, images = (time.perf_counter(), time.thread_time(), time.process_time(), *counts), 0
        while time.perf_counter() - before[0] < seconds:
            for files in groups:
                decoder(files)
                images += len(files.start)
        stream.synchronize()
        after = time.perf_counter(), time.thread_time(), time.process_time(), *counts
    wall, host, cpu, number, multiplying = (b - a for a, b in zip(before, after, strict=True))
    return {
        "images_per_s": round(images / wall, 1),
        "host_ms": round(host / images * BATCH * 1e3, 2),
        "cpu_ms": round((cpu - multiplying) / images * BATCH * 1e3, 2),
        "products_per_s": round(number / wall, 1),
    }


def package_versions() -> dict[str, str | None]:
    installed = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    return versions() | {name: installed.get(name) for name in PACKAGES}


def main(settings: Settings) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    about = {
        "gpu": torch.cuda.get_device_name(device),
        "cpu_cores": cores(),
        "file_size": f"{settings.width}x{settings.height}, quality {settings.quality}",
        **package_versions(),
        "commit": commit(),
    }
    groups = make_files(settings)
    about["file_bytes"] = int(groups[0].length[0])
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with settings.output.open("w") as lines:
        for name in settings.decoders:
            try:
                decoder = DECODERS[name](device)
                check(decoder, groups[0])
                for beside in (False, True):
                    case = {"decoder": name, "beside": "products" if beside else "nothing"}
                    result = case | measure(decoder, groups, beside, settings.seconds)
                    print(json.dumps(result), flush=True)
                    lines.write(json.dumps(result | about) + "\n")
                    lines.flush()
            except (ImportError, AttributeError, OSError, RuntimeError) as error:
                print(json.dumps({"decoder": name, "skipped": one_line(error)}), flush=True)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings, description=__doc__).parse_args_into_dataclasses())
