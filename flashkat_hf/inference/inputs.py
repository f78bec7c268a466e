"""From what workers have read to pixel values on the device, one batch ahead of the model."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from ..data.augmentation import evaluation_in_batches
from ..data.gpu.augmentation import missing_for_kernels
from ..data.gpu.decoding import decodes
from ..data.gpu.evaluation import BatchEvaluation, Evaluation
from ..data.gpu.records import EncodedCrops
from ..data.prefetch import made_ahead
from ..data.samples import DataError, Transform, open_image

DECODERS = ("auto", "workers", "gpu")


class Inputs:
    """The two parts of making pixel values: `transform`, in worker processes, and `batches`, on the device.

    Args:
        transform: from a picture to pixel values, as `evaluation_transform` makes it.
        device: the model's.
        decoder: who decodes JPEG files: "workers", "gpu", or "auto": a GPU that can, for a transform that
            resizes and crops.

    Raises:
        ValueError: "gpu", and it is none, or cannot do what the transform does.
    """

    def __init__(self, transform: Transform, device: torch.device, decoder: str = "auto"):
        self.device = device
        self.transform: Any = transform
        self.module: BatchEvaluation | None = None
        self.evaluation: Evaluation | None = None
        if decoder == "workers":
            return
        parts, missing = evaluation_in_batches(transform), missing_for_kernels(device)
        if missing is None and parts is None:
            missing = "a transform that resizes, crops and normalises colours"
        if missing is None and not decodes(device):
            missing = "nvJPEG in torchvision"
        if missing is None and parts is not None:
            self.transform = parts[0]
            self.evaluation = parts[0].evaluation
            self.module = parts[1].to(device)
        elif decoder == "gpu":
            raise ValueError(f"--decoder gpu needs {missing}")

    def batches(
        self, read: Iterable[dict[str, Any]]
    ) -> Generator[tuple[dict[str, Any], Tensor | None], None, None]:
        """Yield each batch that was read, and its pixel values on the device, or None if it has none.

        A file that the device cannot decode is tried by PIL; if that cannot either, the batch's `errors` say
        so. Close the iterator when it is not read to its end.
        """
        order: deque[dict[str, Any]] = deque()

        def inputs() -> Iterator[dict[str, Any]]:
            for batch in read:
                order.append(batch)
                yield {"batch": batch}

        on_gpu = self.device.type == "cuda"
        decode = self._decode if self.module is not None else None
        with closing(made_ahead(inputs(), self._make, self.device, on_gpu, decode)) as made:
            for tensors in made:
                yield order.popleft(), tensors.get("pixel_values")

    def _decode(self, item: dict[str, Any]) -> dict[str, Any]:
        inputs = item["batch"]["inputs"]
        if inputs is None or self.module is None:
            return item
        try:
            return {**item, "inputs": self.module.decode(inputs)}
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # `_make` finds out which file it is
            return item

    def _make(self, item: dict[str, Any]) -> dict[str, Tensor]:
        batch = item["batch"]
        inputs = item.get("inputs", batch["inputs"])
        if inputs is None:
            return {}
        if self.module is None:
            return {"pixel_values": inputs["pixel_values"].to(self.device, non_blocking=True)}
        try:
            return self.module(inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pixels = self._one_by_one(batch, batch["inputs"])
            return {} if pixels is None else {"pixel_values": pixels}

    def _one_by_one(self, batch: dict[str, Any], inputs: dict[str, Tensor]) -> Tensor | None:
        """Return what PIL makes of each file, and note the errors in the batch."""
        assert self.module is not None
        crops = EncodedCrops.unpacked(inputs["crop"])
        places = [place for place, error in enumerate(batch["errors"]) if error is None]
        made = []
        for place, encoded, data in zip(
            places, crops.height.tolist(), crops.files(inputs["pixel_values"]).parts(), strict=True
        ):
            try:
                if encoded:
                    data = self._by_pil(data, batch["names"][place])
                made.append(data.reshape(3, *self.module.size))
            except DataError as error:
                batch["errors"][place] = str(error)
        return self.module.normalised(torch.stack(made).to(self.device)) if made else None

    def _by_pil(self, data: Tensor, name: str) -> Tensor:
        assert self.evaluation is not None
        return self.evaluation.pixels(open_image(data.numpy().tobytes(), name))
