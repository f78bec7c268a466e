"""JPEG files to crops of one size, a batch at once: decoded (on a GPU by nvJPEG), and resized.

Why not a library: beside matrix products on an H200, `nvjpeg.py` decodes 20,530 images/s, nvImageCodec 0.9
6,829 and torchvision 0.26 6,617; alone 27,306, 16,750 and 20,618 (benchmarks/results/decoding.jsonl, by
`bench_decoding.py`). torchcodec for that PyTorch was not at hand. For the few files that the GPU's own
decoders do not know, torchvision's deprecated `decode_jpeg` serves: nvImageCodec is as fast there, and a
package more.
"""

import functools
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from ...messages import extra
from .nvjpeg import HardwareDecoders
from .records import Crops, DecodedImages, Decoder, EncodedFiles, Windows

try:
    from .triton_crops import resized_crops
except ImportError:  # no triton: worker processes do everything, and nothing here is called
    resized_crops = cast(Any, None)

FILES = 64  # that torchvision decodes at once
CROP_BYTES = 2**28  # of the crops' pixels that are resized at once
_one_at_a_time = threading.Lock()


class TorchvisionDecoder:
    """A `Decoder` that knows every JPEG file: torchvision's `decode_jpeg`, by libjpeg or on a GPU by nvJPEG.

    A GPU reads the files when it comes to it: they are kept until the next call, which waits for it first.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.files: list[Tensor] = []

    def __call__(self, files: EncodedFiles) -> DecodedImages:
        functions, parts = extra("torchvision.io"), files.parts()
        try:
            return DecodedImages.of(functions.decode_jpeg(parts, functions.ImageReadMode.RGB, self.device))
        finally:
            self.files = parts


def decode_files(files: EncodedFiles, device: torch.device) -> DecodedImages:
    """Decode JPEG files in whole.

    On a GPU its own decoders serve where it has such, and torchvision does the rest, on streams on which
    nothing else runs: their memory comes back to them when others are done with the images.
    """
    if device.type != "cuda":
        return TorchvisionDecoder(device)(files)
    stream, hardware = _decoding_stream(device), _hardware_decoder(device)
    address, height, width = (torch.empty(len(files.start), dtype=torch.int64) for _ in range(3))
    memory: list[Tensor] = []

    def decode(decoder: Decoder, part: Tensor) -> None:
        images = decoder(files[part])
        address[part] = images.address
        height[part] = images.height
        width[part] = images.width
        memory.extend(images.memory)

    refused = torch.ones(len(files.start), dtype=torch.bool)
    with _one_at_a_time, torch.cuda.stream(stream), _unfilled():
        plain = (files.plain > 0).nonzero()[:, 0]
        if hardware is not None and len(plain):
            with suppress(RuntimeError):  # the other decoder knows the files, or what is wrong with one
                decode(hardware, plain)
                refused[plain] = False
        others = refused.nonzero()[:, 0]
        for part in others.split(FILES) if len(others) else ():
            decode(_fallback_decoder(device), part)
    return DecodedImages(address, height, width, memory, stream.record_event())


def crop_images(
    images: DecodedImages, crops: Crops, size: tuple[int, int], windows: Windows | None = None
) -> Tensor:
    """Resize parts of images to one size, with antialiasing as torchvision and PIL do it, up to rounding.

    Args:
        images: on a device.
        crops: the part of each.
        size: height and width of the result.
        windows: to what each part is resized, and where in that the result lies; by default to `size`.

    Returns:
        `(images, 3, height, width)` uint8.
    """
    images.wait()
    parts, start = [], 0
    for stop in _stops(crops):
        part = slice(start, stop)
        parts.append(resized_crops(images[part], crops[part], size, windows and windows[part]))
        start = stop
    return torch.cat(parts)


def decodes(device: torch.device) -> bool:
    """Return whether a device has a decoder for the JPEG files that its own decoders refuse."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "JPEG")
    data = torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)
    start, length, side = (torch.tensor([number]) for number in (0, len(data), 16))
    try:
        decode_files(EncodedFiles(start, length, side, side, plain=start, data=data), device)
    except (RuntimeError, ValueError):  # built without nvJPEG, or for another kind of GPU
        return False
    return True


@functools.cache
def _decoding_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


@functools.cache
def _hardware_decoder(device: torch.device) -> Decoder | None:
    try:
        return HardwareDecoders(device)
    except (OSError, RuntimeError):  # no nvJPEG, or a GPU without such decoders
        return None


@functools.cache
def _fallback_decoder(device: torch.device) -> Decoder:
    return TorchvisionDecoder(device)


@contextmanager
def _unfilled() -> Iterator[None]:
    """Keep deterministic mode from filling new memory, which decoders do not wait for."""
    deterministic = cast(Any, torch.utils.deterministic)
    fills, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, False
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fills


def _stops(crops: Crops) -> Iterator[int]:
    """Yield the ends of groups of crops which fit the memory if each is as large as the largest of them."""
    count, rows, columns = 0, 0, 0
    for number, (height, width) in enumerate(zip(crops.height.tolist(), crops.width.tolist(), strict=True)):
        rows, columns, count = max(rows, height), max(columns, width), count + 1
        if count > 1 and 3 * count * rows * columns > CROP_BYTES:
            yield number
            count, rows, columns = 1, height, width
    yield len(crops.height)
