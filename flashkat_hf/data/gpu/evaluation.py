"""Evaluation in batches on a device: workers read files, a GPU decodes, resizes, crops and normalises them.

It is the evaluation transform up to rounding: PIL rounds to whole levels between width and height, too.
"""

from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ...messages import extra
from ..samples import Sample, header, open_image, unreadable
from .augmentation import BatchOfCrops, missing_for_kernels
from .planning import decodable, is_plain, read
from .records import EncodedCrops, Windows


class Evaluation(NamedTuple):
    """The steps of an evaluation transform, as numbers that a worker and a device read.

    Attributes:
        resize: shorter side, or height and width, to which an image is resized.
        size: height and width of the middle part that is kept.
        bicubic: whether the filter is bicubic; otherwise it is bilinear.
        most_aspect: longer over shorter side of images that are resized whole.
        pixels: transform of a PIL image up to there.
    """

    resize: int | tuple[int, int]
    size: tuple[int, int]
    bicubic: bool
    most_aspect: int
    pixels: Any

    def window(self, height: int, width: int) -> dict[str, int] | None:
        """Return a `Windows` row of an image of that size, or None if the transform is no resize and crop."""
        short, long = sorted((height, width))
        if isinstance(self.resize, int):
            if long > self.most_aspect * short:
                return None
            other = int(self.resize * long / short)  # as torchvision rounds it
            rows, columns = (self.resize, other) if height <= width else (other, self.resize)
        else:
            rows, columns = self.resize
        if rows < self.size[0] or columns < self.size[1]:  # the crop adds a border
            return None
        top, left = (round((a - b) / 2.0) for a, b in zip((rows, columns), self.size, strict=True))
        return {"height": rows, "width": columns, "top": top, "left": left}


class EvaluationPart:
    """A worker process's part before a `BatchEvaluation`: it reads a file, and looks at its header."""

    takes_sample = True

    def __init__(self, evaluation: Evaluation):
        self.evaluation = evaluation

    def __call__(self, sample: Sample) -> dict[str, Tensor]:
        """Return a JPEG file's bytes, or the pixels of an image that a device cannot decode.

        Returns:
            "pixel_values": `(length,)` uint8. "crop": a row of `EncodedCrops`. "window": a row of `Windows`.

        Raises:
            DataError: the image cannot be read.
        """
        encoded = read(sample)
        if isinstance(encoded, bytes):
            try:
                with header(encoded) as image:
                    window = self.evaluation.window(image.height, image.width)
                    if window and decodable(image, encoded):
                        return self.undecoded(encoded, image, window)
            except Exception as error:  # PIL's decoders raise more than OSError for broken files
                raise unreadable(sample.image, sample.name, error) from error
        pixels = self.evaluation.pixels(open_image(encoded, sample.name)).flatten()
        crop = EncodedCrops.row(length=len(pixels))
        return {"pixel_values": pixels, "crop": crop, "window": Windows.row()}

    def undecoded(self, encoded: bytes, image: Image.Image, window: dict[str, int]) -> dict[str, Tensor]:
        sides = {"height": image.height, "width": image.width}
        crop = EncodedCrops.row(
            **sides,
            bicubic=self.evaluation.bicubic,
            length=len(encoded),
            image_height=image.height,
            image_width=image.width,
            plain=is_plain(image),
        )
        data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        return {"pixel_values": data, "crop": crop, "window": Windows.row(**window)}


class BatchEvaluation(BatchOfCrops):
    """Makes the pixel values of a batch on the device that it is on.

    Takes what `collate` makes of an `EvaluationPart`'s items, on the CPU.
    """

    @torch.no_grad()
    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return `{"pixel_values": (batch, 3, height, width) float32, normalised}` on the device.

        Raises:
            ValueError: the module is on a CPU, or triton is missing.
            RuntimeError: a file cannot be decoded.
        """
        if missing := missing_for_kernels(self.mean.device):
            raise ValueError(f"evaluation in batches needs {missing}")
        return {"pixel_values": self.normalised(self.crops(batch))}


def levels_of(transforms: list[Any]) -> Any:
    """Return transforms of a PIL image that end with its levels, `(3, height, width)` uint8."""
    module = extra("torchvision.transforms")
    return module.Compose([*transforms, module.PILToTensor()])
