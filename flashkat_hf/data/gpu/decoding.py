"""JPEG files to crops of one size, a batch at once: decoded (on a GPU by nvJPEG), and resized."""

import functools
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor

from ...messages import extra
from .nvjpeg import HardwareDecoder

try:
    from .triton_crops import resized_crops
except ImportError:  # no triton: matrix products serve every device
    resized_crops = None

FILES = 64  # decoded at once
CROP_BYTES = 2**28  # of the crops' pixels that are resized at once


class Decoded(NamedTuple):
    """Images `(3, height, width)` uint8 on a device.

    Attributes:
        places: `(count, 3)` int64 on the CPU: address, height and width of each.
        memory: where they are; images, or blocks with many of them.
        event: what tells that they are there.
    """

    places: Tensor
    memory: list[Tensor]
    event: torch.Event | None

    def wait(self) -> None:
        """The device's current stream goes on when they are there."""
        if self.event is not None:
            stream = torch.cuda.current_stream(self.memory[0].device)
            stream.wait_event(self.event)
            for memory in self.memory:
                memory.record_stream(stream)

    def images(self) -> list[Tensor]:
        found = []
        for address, height, width in self.places.tolist():
            memory = next(one for one in self.memory if 0 <= address - one.data_ptr() < one.numel())
            start = address - memory.data_ptr()
            found.append(memory.flatten()[start : start + 3 * height * width].view(3, height, width))
        return found


def decoded(data: Tensor, files: Tensor, device: torch.device) -> Decoded:
    """JPEG files in whole.

    On a GPU by its own decoders where it has such, on a stream on which nothing else runs: its memory comes
    back to it when others are done with the images. torchvision does the rest.

    Args:
        data: `(num_bytes,)` uint8 on the CPU; pinned memory is copied faster.
        files: `(count, 5)` int64 on the CPU: start and length in `data`, height and width of the image, and
            whether a GPU's own decoders know such files.
        device: where the images are wanted.
    """
    if device.type != "cuda":
        images = _by_torchvision(data, files, device)
        return Decoded(_places(images), images, None)
    own, decoder = _decoding_stream(device), _hardware_decoder(device)
    places, memory = torch.cat((files[:, :1], files[:, 2:4]), 1), []
    left = torch.ones(len(files), dtype=torch.bool)
    with _one_at_a_time, torch.cuda.stream(own), _unfilled():
        if decoder is not None:
            for part in _parts(files[:, 4] > 0):
                try:
                    block, places[part, 0] = decoder(data, files[part])
                except RuntimeError:  # torchvision knows the files, or what is wrong with one
                    continue
                memory.append(block)
                left[part] = False
        for part in _parts(left):
            images = _by_torchvision(data, files[part], device)
            places[part] = _places(images)
            memory += images
    return Decoded(places, memory, own.record_event())


def decoded_crops(images: Decoded, crops: Tensor, size: tuple[int, int]) -> Tensor:
    """Parts of images, resized with antialiasing as torchvision and PIL do it, up to rounding.

    Args:
        images: what `decoded` gives.
        crops: `(images, 6)` int64 on the CPU: top, left, height and width of the part, whether the filter is
            bicubic (else bilinear), whether the result is mirrored.
        size: height and width of the result.

    Returns:
        `(images, 3, height, width)` uint8.
    """
    images.wait()
    made, start, device = [], 0, images.memory[0].device
    for stop in _stops(crops):
        some = slice(start, stop)
        if resized_crops and device.type == "cuda":
            made.append(resized_crops(images.places[some], crops[some], size, device))
        else:
            made.append(resized_by_products(images.images()[some], crops[some], size))
        start = stop
    return torch.cat(made)


def decodes(device: torch.device) -> bool:
    """Whether JPEG files can be decoded there."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "JPEG")
    data = torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)
    try:
        decoded(
            data, torch.tensor([[0, len(data), 16, 16, 0]]), device
        )  # by torchvision, which has to do the rest
    except (RuntimeError, ValueError):  # built without nvJPEG, or for another kind of GPU
        return False
    return True


def _by_torchvision(data: Tensor, files: Tensor, device: torch.device) -> list[Tensor]:
    """All at once.

    On a GPU it writes at once, even if the current stream has still to read what was in that memory before:
    that must be a stream's on which nothing else runs. And it reads the files when it comes to it: they are
    kept until the next call, which waits for it first.
    """
    functions = extra("torchvision.io")
    parts = [data[start : start + length] for start, length in files[:, :2].tolist()]
    try:
        return functions.decode_jpeg(parts, functions.ImageReadMode.RGB, device)
    finally:
        _in_reading[:] = parts


@contextmanager
def _unfilled() -> Iterator[None]:
    """Without deterministic mode's fill of new memory, which decoders do not wait for."""
    deterministic = cast(Any, torch.utils.deterministic)
    fills, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, False
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fills


def _parts(chosen: Tensor) -> list[Tensor]:
    """Numbers of the chosen files, so many at a time as are decoded at once."""
    return [part for part in chosen.nonzero()[:, 0].split(FILES) if len(part)]


def _places(images: list[Tensor]) -> Tensor:
    return torch.tensor([(image.data_ptr(), *image.shape[1:]) for image in images])


_one_at_a_time = threading.Lock()
_in_reading: list[Tensor] = []


@functools.cache
def _decoding_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


@functools.cache
def _hardware_decoder(device: torch.device) -> HardwareDecoder | None:
    try:
        return HardwareDecoder(device) if resized_crops else None
    except (OSError, RuntimeError):  # no nvJPEG, or a GPU without such decoders
        return None


def _stops(windows: Tensor) -> Iterator[int]:
    """Ends of groups in a row whose windows, as large as the largest, fit the memory.

    At least one in each.
    """
    count, rows, columns = 0, 0, 0
    for number, (_, _, height, width, *_) in enumerate(windows.tolist()):
        rows, columns, count = max(rows, height), max(columns, width), count + 1
        if count > 1 and 3 * count * rows * columns > CROP_BYTES:
            yield number
            count, rows, columns = 1, height, width
    yield len(windows)


def resized_by_products(images: list[Tensor], windows: Tensor, size: tuple[int, int]) -> Tensor:
    """What `triton_crops.resized_crops` gives: all parts on one canvas, by two batched matrix products."""
    count, rows, columns = len(images), *windows[:, 2:4].amax(0).tolist()
    device = images[0].device
    canvas = torch.empty(count, rows, 3, columns, dtype=torch.uint8, device=device)
    for room, image, (top, left, height, width, *_) in zip(canvas, images, windows.tolist(), strict=True):
        room[:height, :, :width].copy_(image[:, top : top + height, left : left + width].movedim(0, 1))
    windows = windows.to(device)
    height, width, bicubic, mirrored = windows[:, 2], windows[:, 3], windows[:, 4] > 0, windows[:, 5] > 0
    across = resizing_weights(width, columns, size[1], bicubic)
    across = torch.where(mirrored[:, None, None], across.flip(1), across)
    along = resizing_weights(height, rows, size[0], bicubic)
    resized = canvas.view(count, rows * 3, columns).float() @ across.mT
    resized = along @ resized.view(count, rows, 3 * size[1])
    return resized.view(count, size[0], 3, size[1]).movedim(2, 1).round().clamp(0, 255).to(torch.uint8)


def resizing_weights(lengths: Tensor, longest: int, size: int, bicubic: Tensor) -> Tensor:
    """What each of `size` results along an axis takes of `lengths` pixels, `(count, size, longest)` float32.

    A triangle, or Keys' cubic with -0.5, as wide as the pixels are dense; what lies outside of the image is
    left out.
    """
    lengths, bicubic = lengths[:, None, None], bicubic[:, None, None]
    density = lengths / size
    pixel = torch.arange(longest, device=lengths.device)
    center = (torch.arange(size, device=lengths.device)[:, None] + 0.5) * density
    distance = ((pixel + 0.5 - center) / density.clamp(min=1)).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    cubic = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    weights = torch.where(bicubic, cubic, (1 - distance).clamp(min=0))
    weights = torch.where(pixel < lengths, weights, 0)
    return weights / weights.sum(-1, keepdim=True)
