"""Augmentation in batches on a device.

RandAugment, normalisation and erasing, and on request decoding and cropping.

Worker processes draw what timm draws, by running timm's own RandAugment and RandomErasing on stand-ins that
note what would be done. The draws travel with the batch as a small tensor, and the module here carries them
out: on a GPU by Triton kernels, else by PyTorch's operations, all images of a batch with the same operation
at once. So a batch is the same function of (seed, epoch, position) as without it, and the operations and
their ranges are timm's; pixels differ from PIL's by rounding, and by PyTorch's operations in bicubic
rotations.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, JpegImagePlugin
from torch import Tensor, nn

from ...messages import extra
from ..samples import Encoded, Sample, header, unreadable
from .decoding import Decoded, decoded, decoded_crops
from .operations import GEOMETRIC, OPERATIONS, augmented_by_operations

try:
    from .triton_augmentation import augmented
except ImportError:  # no triton: PyTorch's operations serve every device
    augmented = None

NONE = -1  # no operation
NOISE, STRIDE = 2**22, 7919  # normal numbers for erased boxes; from one seed's place in them to the next
AHEAD_BYTES = 2**26  # of files that are decoded at once, and of a batch's that are before it is needed
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class Draws:
    """What timm's RandAugment and RandomErasing would do to one image.

    They are called with this in its place.

    `plan()` is `(3 * layers + 5,)` float32: operation, argument and PIL's filter for each layer; top, left,
    height and width of the erased box; the seed of its noise.
    """

    dtype = torch.float32

    def __init__(self, rand_augment, erasing, size: tuple[int, int]):
        self.shape, self.operations, self.box = (1, *size), [], (0, 0, 0, 0)
        if rand_augment is not None:
            rand_augment(self)
        if erasing is not None:
            erasing(self)
        self.num_layers = rand_augment.num_layers if rand_augment is not None else 0

    def size(self) -> tuple[int, int, int]:
        return self.shape

    def __setitem__(self, where: tuple[slice, slice, slice], noise: Tensor) -> None:
        _, rows, columns = where
        self.box = rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start

    def plan(self) -> Tensor:
        missing = self.num_layers - len(self.operations)
        operations = [*self.operations, *[(NONE, 0.0, 0)] * missing]
        noise_seed = random.getrandbits(24)  # a float32 holds it
        return torch.tensor(
            [value for operation in operations for value in operation] + [*self.box, noise_seed]
        )


def _note(number: int, draws: Draws, *arguments: float, resample: Any, fillcolor: Any) -> Draws:
    """In place of one of timm's functions: note it, and draw the filter as it does."""
    chosen = 0
    if number < len(GEOMETRIC):
        chosen = random.choice(resample) if isinstance(resample, Sequence) else resample
    draws.operations.append((number, float(arguments[0]) if arguments else 0.0, int(chosen)))
    return draws


def in_batches(rand_augment: str | None) -> bool:
    """Whether batches can do all operations of timm's RandAugment of this configuration string."""
    if not rand_augment:
        return True
    made = extra("timm.data.auto_augment").rand_augment_transform(rand_augment, {})
    return all(operation.aug_fn.__name__ in OPERATIONS for operation in made.ops)


def drawing(rand_augment) -> Any:
    """Timm's RandAugment, changed to note its operations in `Draws`.

    Raises:
        ValueError: it has an operation that is not in `OPERATIONS`.
    """
    for operation in rand_augment.ops:
        name = operation.aug_fn.__name__
        if name not in OPERATIONS:
            raise ValueError(
                f"RandAugment's {operation.name} cannot be done in batches; use on_device='nothing'"
            )
        operation.aug_fn = partial(_note, OPERATIONS.index(name))
    return rand_augment


class WorkerPart:
    """What a worker process does to one encoded image, before a `BatchAugmentation`."""

    takes_sample = True

    def __init__(self, transforms: tuple, size: tuple[int, int], decode: bool):
        """From timm's three transforms: crop and flip; RandAugment; normalisation and erasing."""
        first, second, last = (part.transforms for part in transforms)
        self.crop, self.flip, self.size, self.decode = first[0], first[1:], size, decode
        self.rand_augment = drawing(second[0]) if second else None
        erasing = [part for part in last if type(part).__name__ == "RandomErasing"]
        self.erasing = erasing[0] if erasing else None
        if self.erasing is not None:
            self.erasing.per_pixel = False  # only the box is wanted of it, not the noise

    def __call__(self, sample: Sample) -> dict[str, Tensor]:
        """Pixels of the crop, `(3, height, width)` uint8, and the plan of the rest.

        For decoding on the device: the bytes of a JPEG file, `(length,)` uint8, and its crop: top, left,
        height, width, whether the filter is bicubic, whether it is mirrored; and of the file the length, the
        image's height and width, and whether a GPU's own decoders know its kind. An image that the device
        cannot decode is given as pixels, with a crop of height 0.
        """
        encoded = _read(sample) if self.decode else sample.image
        try:
            with header(encoded) as image:
                turned = image.getexif().get(0x0112) in TURNED
                width, height = image.size[::-1] if turned else image.size
                box, filter_ = self._box(width, height), self._filter()
                if self.decode and isinstance(encoded, bytes) and _decodable(image, encoded):
                    return self._undecoded(encoded, (box, filter_), (height, width, _plain(image)))
                # libjpeg leaves out what is not needed for a result at least as large as the crop's
                least = width * self.size[1] // box[3], height * self.size[0] // box[2]
                image.draft(None, (least[1], least[0]) if turned else least)
                image = ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:  # PIL's decoders raise more than OSError for broken files
            raise unreadable(sample.image, sample.name, error) from error
        pixels = self._cropped(image, box, image.width / width, image.height / height, filter_)
        if not self.decode:
            return {"pixel_values": pixels, "plan": self._plan()}
        crop = torch.tensor([*[0] * 6, pixels.numel(), *[0] * 3])
        return {"pixel_values": pixels.flatten(), "plan": self._plan(), "crop": crop}

    def _cropped(
        self, image: Image.Image, box: tuple[int, int, int, int], x: float, y: float, filter_
    ) -> Tensor:
        """Crop and flip of an image that is smaller than its header says by the factors x and y."""
        functions, (top, left, rows, columns) = extra("torchvision.transforms.functional"), box
        if x == y == 1:
            image = functions.resized_crop(image, *box, self.size, filter_)
        else:
            part = (
                left * x,
                top * y,
                min((left + columns) * x, image.width),
                min((top + rows) * y, image.height),
            )
            image = image.resize((self.size[1], self.size[0]), Image.Resampling[filter_.name], part)
        for part in self.flip:
            image = part(image)
        return functions.pil_to_tensor(image)

    def _undecoded(self, encoded: bytes, crop: tuple, image: tuple[int, int, bool]) -> dict[str, Tensor]:
        box, filter_ = crop
        mirrored = any(torch.rand(1) < part.p for part in self.flip)  # torchvision's draw
        bicubic = filter_.value == "bicubic"
        data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        numbers = torch.tensor([*box, bicubic, mirrored, len(data), *image])
        return {"pixel_values": data, "plan": self._plan(), "crop": numbers}

    def _plan(self) -> Tensor:
        return Draws(self.rand_augment, self.erasing, self.size).plan()

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        canvas = torch.empty(1, height, width, device="meta")  # only its size is asked for
        return self.crop.get_params(canvas, self.crop.scale, self.crop.ratio)

    def _filter(self) -> Any:
        filters = self.crop.interpolation
        return random.choice(filters) if isinstance(filters, tuple) else filters


def _read(sample: Sample) -> Encoded:
    """The file's bytes, where there is a file."""
    if not isinstance(sample.image, str | Path):
        return sample.image
    try:
        return Path(sample.image).read_bytes()
    except OSError as error:
        raise unreadable(sample.image, sample.name, error) from error


def _decodable(image, encoded: bytes) -> bool:
    """Whether nvJPEG gives what PIL gives.

    A whole upright JPEG file of one frame, of one or three components.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or len(image.layer) != image.layers:
        return False
    return image.getexif().get(0x0112, 1) == 1 and b"\xff\xd9" in encoded[-64:]


def _plain(image) -> bool:
    """Whether a GPU's own decoders know the file.

    Not progressive, with chroma whole or halved or quartered.
    """
    whole = image.mode == "L" or JpegImagePlugin.get_sampling(image) >= 0
    return whole and not image.info.get("progressive")


class BatchAugmentation(nn.Module):
    """Carries out the plans of a batch on the device that it is on.

    Takes what `TrainBatches` gives with a `WorkerPart`, on the CPU, and returns `{"pixel_values": (batch, 3,
    height, width) float32, normalised, "labels": (batch,) int64}`. Draws nothing from global generators.
    """

    mean: Tensor
    std: Tensor
    outside: Tensor
    noise: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], size: tuple[int, int]):
        super().__init__()
        self.size = size
        self.fill = [min(255, round(255 * value)) for value in mean]  # timm's
        self.register_buffer("outside", torch.tensor(self.fill, dtype=torch.float32)[:, None, None])
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None])
        self.register_buffer(
            "noise", torch.randn(NOISE, generator=torch.Generator().manual_seed(0)), persistent=False
        )

    @torch.no_grad()
    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        device, plan = self.mean.device, batch["plan"]
        if "crop" in batch:
            images = self._crops(batch)
        else:
            images = batch["pixel_values"].to(device, non_blocking=True, copy=True)
        full, num_layers = self.full_plan(plan)
        rest = num_layers, self.outside, self.mean, self.std, self.noise, STRIDE
        if augmented and images.is_cuda:
            pixels = augmented(images, full.to(device, non_blocking=True), *rest)
        else:
            pixels = augmented_by_operations(images, full, *rest)
        return {"pixel_values": pixels, "labels": batch["labels"].to(device, non_blocking=True)}

    def decode(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its JPEG files decoded, for a thread that runs ahead of the one that calls the module.

        A batch of large files stays as it is: their images would take too much memory.
        """
        if "crop" not in batch or batch["pixel_values"].numel() > AHEAD_BYTES:
            return batch
        return {**batch, "decoded": list(self._decoded(batch))}

    def _decoded(self, batch: dict[str, Any]) -> Iterator[tuple[Tensor, Decoded]]:
        """Numbers of images that came as JPEG files, and these images, so many as have `AHEAD_BYTES` at a time."""
        lengths = batch["crop"][:, 6]
        files = torch.cat(((lengths.cumsum(0) - lengths)[:, None], batch["crop"][:, 6:]), 1)
        numbers = (batch["crop"][:, 2] > 0).nonzero()[:, 0]
        group = files[numbers, 0] // AHEAD_BYTES
        for number in group.unique():
            some = numbers[group == number]
            yield some, decoded(batch["pixel_values"], files[some], self.mean.device)

    def _crops(self, batch: dict[str, Any]) -> Tensor:
        """Of the JPEG files, and what workers have decoded, `(batch, 3, height, width)` uint8."""
        crops, device = batch["crop"], self.mean.device
        result = torch.empty(len(crops), 3, *self.size, dtype=torch.uint8, device=device)
        for numbers, images in batch.get("decoded") or self._decoded(batch):
            made = decoded_crops(images, crops[numbers, :6], self.size)
            if len(numbers) == len(crops):
                return made
            result[numbers.to(device)] = made
        ends = crops[:, 6].cumsum(0).tolist()
        for number in (crops[:, 2] == 0).nonzero()[:, 0].tolist():
            pixels = batch["pixel_values"][ends[number] - crops[number, 6] : ends[number]]
            result[number] = pixels.unflatten(0, (3, *self.size)).to(device, non_blocking=True)
        return result

    def full_plan(self, plan: Tensor) -> tuple[Tensor, int]:
        """With each operation's map behind its three numbers, as `augmented` takes it.

        And the number of layers.
        """
        operations = plan[:, :-5].unflatten(1, (-1, 3))
        maps = self._maps(operations.flatten(0, 1)).unflatten(0, operations.shape[:2])
        return torch.cat((torch.cat((operations, maps), 2).flatten(1), plan[:, -5:]), 1), operations.shape[1]

    def _maps(self, operations: Tensor) -> Tensor:
        """Shears, translations and rotations as affine maps of the output's pixels to the input's, `(batch, 6)`."""
        height, width = self.size
        numbers, amounts, _ = operations.unbind(1)
        shear_x, shear_y, right, down, turn = (torch.where(numbers == i, amounts, 0) for i in range(5))
        angle = torch.deg2rad(-turn)  # PIL turns the other way round
        cos, sin = angle.cos(), angle.sin()
        x, y = width / 2, height / 2  # the center stays
        to_x = cos, sin + shear_x, right * width + x - cos * x - sin * y
        to_y = shear_y - sin, cos, down * height + y + sin * x - cos * y
        return torch.stack((*to_x, *to_y), 1)
