"""The JPEG decoders that NVIDIA's data-center GPUs have beside their multiprocessors, used through nvJPEG.

Torchvision's `decode_jpeg` uses them too, but lets nvJPEG pipeline its work, which gets little done beside a
training step. Without that each decoder has a stream in nvJPEG, on which a file is one copy and one kernel.
"""

import ctypes
from ctypes import byref, c_int, c_uint, c_void_p
from pathlib import Path
from typing import NamedTuple

import numpy
import torch

from ...messages import extra
from .records import DecodedImages, EncodedFiles

HARDWARE, NO_PIPELINE, RGB = 3, 1, 3  # of nvjpeg.h
ALIGNMENT = 256  # bytes from one image's place in memory to another's
ARGUMENTS = {
    "nvjpegCreateEx": (c_int, c_void_p, c_void_p, c_uint, c_void_p),
    "nvjpegJpegStateCreate": (c_void_p, c_void_p),
    "nvjpegDecodeBatchedInitialize": (c_void_p, c_void_p, c_int, c_int, c_int),
    "nvjpegDecodeBatched": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
}


class Prepared(NamedTuple):
    """A call of nvJPEG.

    Attributes:
        files: what is decoded.
        encoded: `(2, count)` int64, address and length of each file.
        places: `(count, 8)` int64, an `nvjpegImage_t` of each image: addresses of four planes, and pitches.
        images: where the images will be.
    """

    files: EncodedFiles
    encoded: numpy.ndarray
    places: numpy.ndarray
    images: DecodedImages


class HardwareDecoder:
    """The decoders of one device; a `Decoder`.

    Raises:
        OSError: there is no nvJPEG.
        RuntimeError: the GPU has no such decoders.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.library = _library()
        self.handle = c_void_p()
        self.state = c_void_p()
        for name, types in ARGUMENTS.items():
            getattr(self.library, name).argtypes = types
        with torch.cuda.device(device):
            self._call("nvjpegCreateEx", HARDWARE, None, None, NO_PIPELINE, byref(self.handle))
            self._call("nvjpegJpegStateCreate", self.handle, byref(self.state))

    def __call__(self, files: EncodedFiles) -> DecodedImages:
        """Decode files into one block of memory, and wait for it.

        Raises:
            RuntimeError: as `decode`.
        """
        return self.decode(self.prepare(files))

    def prepare(self, files: EncodedFiles) -> Prepared:
        """Take a block of memory for the images, and write down what nvJPEG is told.

        The threads of a process take turns in Python, and each call from it may have to wait for its turn:
        there are few of them here, and none for each file.
        """
        heights, widths = files.height.numpy(), files.width.numpy()
        planes = heights * widths
        ends = (-(-3 * planes // ALIGNMENT) * ALIGNMENT).cumsum()
        # not torch.empty, which fills new memory in deterministic mode, and decoders do not wait for that
        block = torch.UntypedStorage(int(ends[-1]), device=self.device)
        memory = torch.empty(0, dtype=torch.uint8, device=self.device).set_(block)
        addresses = memory.data_ptr() + numpy.concatenate(([0], ends[:-1]))
        places = numpy.zeros((len(planes), 8), numpy.int64)
        places[:, :3] = addresses[:, None] + planes[:, None] * numpy.arange(3)
        places[:, 4:7] = widths[:, None]
        encoded = numpy.stack((files.data.data_ptr() + files.start.numpy(), files.length.numpy()))
        images = DecodedImages(torch.from_numpy(addresses), files.height, files.width, [memory])
        return Prepared(files, encoded, places, images)

    def decode(self, prepared: Prepared) -> DecodedImages:
        """Decode files on the current stream, and wait for it.

        Raises:
            RuntimeError: a file is of a kind that the decoders do not know (progressive, ...), or broken.
        """
        stream, encoded = torch.cuda.current_stream(self.device), prepared.encoded
        pointers = *(row.ctypes.data for row in encoded), prepared.places.ctypes.data, stream.cuda_stream
        with torch.cuda.device(self.device):
            self._call("nvjpegDecodeBatchedInitialize", self.handle, self.state, encoded.shape[1], 1, RGB)
            self._call("nvjpegDecodeBatched", self.handle, self.state, *pointers)
        stream.synchronize()  # nvJPEG's own memory is used again by the next call
        return prepared.images

    def _call(self, name: str, *arguments) -> None:
        if status := getattr(self.library, name)(*arguments):
            raise RuntimeError(f"{name} failed with nvJPEG's status {status}")


def _library() -> ctypes.CDLL:
    """Load torchvision's nvJPEG, else the system's."""
    beside = Path(extra("torchvision").__file__).parents[1] / "torchvision.libs"
    names = [*beside.glob("libnvjpeg*.so*"), f"libnvjpeg.so.{(torch.version.cuda or '').partition('.')[0]}"]
    return ctypes.CDLL(str(names[0]))
