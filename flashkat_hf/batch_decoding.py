"""JPEG files to crops of one size, a batch at once: decoded (on a GPU by nvJPEG), and resized."""

import functools
import io
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor

from .images import extra

try:
    from .triton_crops import resized_crops
except ImportError:  # no triton: matrix products serve every device
    resized_crops = None

FILES = 64  # decoded at once
CROP_BYTES = 2**28  # of the crops' pixels that are resized at once


class Decoded(NamedTuple):
    """Images `(3, height, width)` uint8 on a device, and what tells it that they are there."""

    images: list[Tensor]
    event: torch.Event | None

    def ready(self) -> list[Tensor]:
        """For the device's current stream, which goes on when they are there."""
        if self.event is not None:
            stream = torch.cuda.current_stream(self.images[0].device)
            stream.wait_event(self.event)
            for image in self.images:
                image.record_stream(stream)
        return self.images


def decoded(files: list[Tensor], device: torch.device) -> Iterator[Decoded]:
    """JPEG files in whole, each `(length,)` uint8 on the CPU, so many at a time as is good for a decoder."""
    for start in range(0, len(files), FILES):
        yield _decode(files[start : start + FILES], device)


def decoded_crops(parts: Iterable[Decoded], crops: Tensor, size: tuple[int, int]) -> Tensor:
    """Parts of images, resized with antialiasing as torchvision and PIL do it, up to rounding.

    Args:
        parts: what `decoded` gives.
        crops: `(images, 6)` int64 on the CPU: top, left, height and width of the part, whether the filter is bicubic
            (else bilinear), whether the result is mirrored.
        size: height and width of the result.

    Returns:
        `(images, 3, height, width)` uint8.
    """
    made = []
    for part, windows in zip(parts, crops.split(FILES), strict=True):
        images, start = part.ready(), 0
        for stop in _stops(windows):
            resized = resized_crops if resized_crops and images[0].is_cuda else resized_by_products
            made.append(resized(images[start:stop], windows[start:stop], size))
            start = stop
    return torch.cat(made)


def decodes(device: torch.device) -> bool:
    """Whether torchvision decodes JPEG files there."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "JPEG")
    try:
        _decode([torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)], device)
    except (RuntimeError, ValueError):  # built without nvJPEG, or for another kind of GPU
        return False
    return True


def _decode(files: list[Tensor], device: torch.device) -> Decoded:
    """All at once.

    nvJPEG writes at once, even if the current stream has still to read what was in that memory before. So the memory is
    that of a stream on which nothing else runs, not even deterministic mode's fill, and comes back to it when others
    are done with the images. It reads the files when it comes to it: they are kept until the next call, which waits
    for it first.
    """
    functions = extra("torchvision.io")
    decode = functools.partial(functions.decode_jpeg, files, functions.ImageReadMode.RGB, device)
    if device.type != "cuda":
        return Decoded(decode(), None)
    own, deterministic = _decoding_stream(device), cast(Any, torch.utils.deterministic)
    with _one_at_a_time:
        fills, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, False
        try:
            with torch.cuda.stream(own):
                images = decode()
        finally:
            deterministic.fill_uninitialized_memory = fills
        _in_reading[:] = files
        return Decoded(images, own.record_event())


_one_at_a_time = threading.Lock()
_in_reading: list[Tensor] = []


@functools.cache
def _decoding_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _stops(windows: Tensor) -> Iterator[int]:
    """Ends of groups in a row whose windows, as large as the largest, fit the memory; at least one in each."""
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

    A triangle, or Keys' cubic with -0.5, as wide as the pixels are dense; what lies outside of the image is left out.
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
