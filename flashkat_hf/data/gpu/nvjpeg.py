"""JPEG files decoded by the decoders that NVIDIA's data-center GPUs have beside their multiprocessors, by nvJPEG.

Torchvision's `decode_jpeg` uses them too, but lets nvJPEG pipeline its work, which gets little done beside a
training step. Without that each decoder has a stream in nvJPEG, on which a file is one copy and one kernel.
"""

import ctypes
from ctypes import byref, c_int, c_uint, c_void_p
from pathlib import Path

import numpy
import torch
from torch import Tensor

from ...messages import extra

HARDWARE, NO_PIPELINE, RGB = 3, 1, 3  # of nvjpeg.h
ALIGNMENT = 256  # bytes from one image's place in memory to another's
ARGUMENTS = {
    "nvjpegCreateEx": (c_int, c_void_p, c_void_p, c_uint, c_void_p),
    "nvjpegJpegStateCreate": (c_void_p, c_void_p),
    "nvjpegDecodeBatchedInitialize": (c_void_p, c_void_p, c_int, c_int, c_int),
    "nvjpegDecodeBatched": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
}


class HardwareDecoder:
    """For one device, and for one thread at a time.

    Raises:
        OSError: there is no nvJPEG.
        RuntimeError: the GPU has no such decoders.
    """

    def __init__(self, device: torch.device):
        self.device, self.library = device, _library()
        for name, types in ARGUMENTS.items():
            getattr(self.library, name).argtypes = types
        self.handle, self.state = c_void_p(), c_void_p()
        with torch.cuda.device(device):
            self._call("nvjpegCreateEx", HARDWARE, None, None, NO_PIPELINE, byref(self.handle))
            self._call("nvjpegJpegStateCreate", self.handle, byref(self.state))

    def __call__(self, data: Tensor, files: Tensor) -> tuple[Tensor, Tensor]:
        """Decode, and wait for it.

        nvJPEG's streams write at once: nothing may still have to be done in the memory of the current stream.
        The threads of a process take turns in Python, and each call from it may have to wait for its turn:
        there are few of them here, and none for each file.

        Args:
            data: `(num_bytes,)` uint8 on the CPU.
            files: `(count, >= 4)` int64 on the CPU: start and length of a file in `data`, height and width of
                its image.

        Returns:
            A block of memory on the device, and the address in it of each image, `(3, height, width)` uint8,
            as `(count,)` int64 on the CPU.

        Raises:
            RuntimeError: a file is of a kind that the decoders do not know (progressive, ...), or broken.
        """
        starts, lengths, heights, widths, *_ = files.numpy().T
        planes = heights * widths
        ends = (-(-3 * planes // ALIGNMENT) * ALIGNMENT).cumsum()
        memory = torch.empty(int(ends[-1]), dtype=torch.uint8, device=self.device)
        addresses = memory.data_ptr() + numpy.concatenate(([0], ends[:-1]))
        images = numpy.zeros(
            (len(files), 8), numpy.int64
        )  # nvjpegImage_t: addresses of four planes, and their pitches
        images[:, :3] = addresses[:, None] + planes[:, None] * numpy.arange(3)
        images[:, 4:7] = widths[:, None]
        given = numpy.stack((data.data_ptr() + starts, lengths))
        stream = torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device):
            self._call("nvjpegDecodeBatchedInitialize", self.handle, self.state, len(files), 1, RGB)
            pointers = *(row.ctypes.data for row in given), images.ctypes.data, stream.cuda_stream
            self._call("nvjpegDecodeBatched", self.handle, self.state, *pointers)
        stream.synchronize()  # nvJPEG's own memory is used again by the next call
        return memory, torch.from_numpy(addresses)

    def _call(self, name: str, *arguments) -> None:
        if status := getattr(self.library, name)(*arguments):
            raise RuntimeError(f"{name} failed with nvJPEG's status {status}")


def _library() -> ctypes.CDLL:
    """Torchvision's nvJPEG, else the system's."""
    beside = Path(extra("torchvision").__file__).parents[1] / "torchvision.libs"
    found = [*beside.glob("libnvjpeg*.so*"), f"libnvjpeg.so.{(torch.version.cuda or '').partition('.')[0]}"]
    return ctypes.CDLL(str(found[0]))
