"""The JPEG decoders that NVIDIA's data-center GPUs have beside their multiprocessors, used through nvJPEG.

Torchvision's `decode_jpeg` uses them too, but lets nvJPEG pipeline its work, which gets little done beside a
training step. Without that each decoder has a stream in nvJPEG, on which a file is one copy and one kernel.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor, wait
from ctypes import byref, c_int, c_uint, c_void_p
from pathlib import Path

import numpy
import torch
from torch import Tensor

from ...messages import extra
from .records import DecodedImages, EncodedFiles

HARDWARE, NO_PIPELINE, RGB = 3, 1, 3  # of nvjpeg.h
ALIGNMENT = 256  # bytes from one image's place in memory to another's
THREADS = 2  # that give the decoders files
ARGUMENTS = {
    "nvjpegCreateEx": (c_int, c_void_p, c_void_p, c_uint, c_void_p),
    "nvjpegJpegStateCreate": (c_void_p, c_void_p),
    "nvjpegDecodeBatchedInitialize": (c_void_p, c_void_p, c_int, c_int, c_int),
    "nvjpegDecodeBatched": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
}


class HardwareDecoders:
    """The decoders of one device, given files by several threads; a `Decoder`.

    nvJPEG copies and launches file by file, in the thread that calls it, which takes longer than decoding.

    Raises:
        OSError: there is no nvJPEG.
        RuntimeError: the GPU has no such decoders.
    """

    def __init__(self, device: torch.device):
        # each with a stream on which nothing else runs
        self.decoders = [
            (HardwareDecoder(device), torch.cuda.Stream(device, priority=-1)) for _ in range(THREADS)
        ]
        self.threads = ThreadPoolExecutor(THREADS, "nvjpeg")

    def __call__(self, files: EncodedFiles) -> DecodedImages:
        """Decode files into a block of memory for each thread, and wait for it.

        Raises:
            RuntimeError: a file is of a kind that the decoders do not know (progressive, ...), or broken.
        """

        def decode(decoder: HardwareDecoder, stream: torch.cuda.Stream, part: Tensor) -> DecodedImages:
            with torch.cuda.stream(stream):
                return decoder(files[part])

        parts = [part for part in torch.arange(len(files.start)).tensor_split(THREADS) if len(part)]
        tasks = [
            self.threads.submit(decode, *decoder, part)
            for decoder, part in zip(self.decoders, parts, strict=False)
        ]
        wait(tasks)  # an error in one of them leaves the others at work
        images = [task.result() for task in tasks]
        address, memory = torch.cat([part.address for part in images]), [part.memory[0] for part in images]
        return DecodedImages(address, files.height, files.width, memory)


class HardwareDecoder:
    """nvJPEG's state of one thread that decodes."""

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

        The threads of a process take turns in Python, and each call from it may have to wait for its turn:
        there are few of them here, and none for each file.

        Raises:
            RuntimeError: a file is of a kind that the decoders do not know (progressive, ...), or broken.
        """
        heights, widths = files.height.numpy(), files.width.numpy()
        planes = heights * widths
        ends = (-(-3 * planes // ALIGNMENT) * ALIGNMENT).cumsum()
        memory = torch.empty(int(ends[-1]), dtype=torch.uint8, device=self.device)
        addresses = memory.data_ptr() + numpy.concatenate(([0], ends[:-1]))
        images = numpy.zeros(
            (len(planes), 8), numpy.int64
        )  # nvjpegImage_t: addresses of four planes, and pitches
        images[:, :3] = addresses[:, None] + planes[:, None] * numpy.arange(3)
        images[:, 4:7] = widths[:, None]
        encoded = numpy.stack((files.data.data_ptr() + files.start.numpy(), files.length.numpy()))
        stream = torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device):
            self._call("nvjpegDecodeBatchedInitialize", self.handle, self.state, len(planes), 1, RGB)
            pointers = *(row.ctypes.data for row in encoded), images.ctypes.data, stream.cuda_stream
            self._call("nvjpegDecodeBatched", self.handle, self.state, *pointers)
        stream.synchronize()  # nvJPEG's own memory is used again by the next call
        return DecodedImages(torch.from_numpy(addresses), files.height, files.width, [memory])

    def _call(self, name: str, *arguments) -> None:
        if status := getattr(self.library, name)(*arguments):
            raise RuntimeError(f"{name} failed with nvJPEG's status {status}")


def _library() -> ctypes.CDLL:
    """Load torchvision's nvJPEG, else the system's."""
    beside = Path(extra("torchvision").__file__).parents[1] / "torchvision.libs"
    names = [*beside.glob("libnvjpeg*.so*"), f"libnvjpeg.so.{(torch.version.cuda or '').partition('.')[0]}"]
    return ctypes.CDLL(str(names[0]))
