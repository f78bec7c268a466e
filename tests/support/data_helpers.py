"""Small labelled images whose pixels say which they are, in every form that `open_data` reads.

And pictures.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy
import timm.data.auto_augment as auto_augment
import torch
from PIL import Image
from torch import Tensor

from flashkat_hf import make_image_processor
from flashkat_hf.data.augmentation import evaluation_transform, posterize
from flashkat_hf.data.gpu.planning import Draws, drawing, is_plain
from flashkat_hf.data.gpu.records import NO_OPERATION, OPERATIONS, DecodedImages, EncodedFiles, Plan
from flashkat_hf.data.seeding import seeded

CLASSES = ["ant", "bee", "cow"]
PROCESSOR = make_image_processor(8, crop=1.0)
PLAIN = evaluation_transform(PROCESSOR)


def encoded(number: int, form: str = "PNG") -> bytes:
    """An image file of one colour that `numbers` reads back; its class is `number % 3`."""
    file = io.BytesIO()
    Image.fromarray(numpy.full((12, 14, 3), number, dtype=numpy.uint8)).save(file, form)
    return file.getvalue()


def numbers(batch: dict[str, Tensor]) -> list[int]:
    """Which images a batch that `PLAIN` made holds."""
    values = batch["pixel_values"][:, 0, 4, 4] * PROCESSOR.image_std[0] + PROCESSOR.image_mean[0]
    return [round(value) for value in (values * 255).tolist()]


def write_folder(root: Path, train: int, test: int) -> Path:
    """An image folder; the training images are 0 to train - 1, the test images follow."""
    for split, part in (("train", range(train)), ("val", range(train, train + test))):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
        for number in part:
            (root / split / CLASSES[number % 3] / f"{number:03}.png").write_bytes(encoded(number))
    return root


def write_shards(root: Path, train: list[int], test: list[int], classes: bool = True) -> Path:
    """WebDataset shards with so many images each."""
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    for split, sizes in (("train", train), ("val", test)):
        for shard, size in enumerate(sizes):
            with tarfile.open(root / f"{split}-{shard:03}.tar", "w") as tar:
                for _ in range(size):
                    label = str(number % 3) if number % 2 else CLASSES[number % 3]
                    add(tar, f"{number:04}.png", encoded(number))
                    if number % 5:
                        add(tar, f"{number:04}.cls", label.encode())
                    else:
                        add(tar, f"{number:04}.json", json.dumps({"label": number % 3}).encode())
                    number += 1
    if classes:
        (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def image_dataset(first: int, last: int, classes: list[str] | None = None):
    """A `datasets.Dataset` of the images first to last - 1."""
    import datasets

    label = datasets.ClassLabel(names=classes or CLASSES)
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": label, "note": datasets.Value("string")}
    )
    rows = range(first, last)
    columns = {
        "picture": [{"bytes": encoded(number), "path": None} for number in rows],
        "kind": [number % 3 for number in rows],
        "note": [str(number) for number in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def smooth_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A picture of this width and height, as smooth as photographs are, in full range."""
    pixels = numpy.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded_picture(
    seed: int, size: tuple[int, int], form: str = "JPEG", mode: str = "RGB", **options
) -> bytes:
    """The file of a `smooth_picture`."""
    return image_file(smooth_picture(seed, size).convert(mode), form, **options)


def image_file(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def encoded_files(files: list[bytes]) -> EncodedFiles:
    """Files as a batch has them."""
    headers = [Image.open(io.BytesIO(file)) for file in files]
    lengths = torch.tensor([len(file) for file in files])
    heights, widths = (torch.tensor([getattr(h, name) for h in headers]) for name in ("height", "width"))
    plain = torch.tensor([int(is_plain(header)) for header in headers])
    data = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
    return EncodedFiles(lengths.cumsum(0) - lengths, lengths, heights, widths, plain, data)


def images_of(decoded: DecodedImages) -> list[Tensor]:
    """The pixels of decoded images, when they are there."""
    decoded.wait()
    images = []
    places = torch.stack((decoded.address, decoded.height, decoded.width), 1)
    for address, height, width in places.tolist():
        memory = next(block for block in decoded.memory if 0 <= address - block.data_ptr() < block.numel())
        start = address - memory.data_ptr()
        images.append(memory.flatten()[start : start + 3 * height * width].view(3, height, width))
    return images


def stacked(images: list[Image.Image]) -> Tensor:
    return torch.stack(
        [torch.from_numpy(numpy.array(image)).permute(2, 0, 1) for image in images]
    ).contiguous()


def by_pil(image: Image.Image, row: Tensor, fill: list[int]) -> Image.Image:
    """What timm's functions make of an image by a row of a `Plan`, less normalisation and erasing."""
    plan = Plan.unpacked(row[None])
    for number, argument, filter_ in torch.stack((plan.number, plan.argument, plan.filter), 2)[0].tolist():
        if number == NO_OPERATION:
            continue
        name = OPERATIONS[int(number)]
        function = posterize if name == "posterize" else getattr(auto_augment, name)
        arguments = [] if name in ("auto_contrast", "equalize", "invert") else [argument]
        if name in ("posterize", "solarize", "solarize_add"):
            arguments = [int(argument)]
        image = function(image, *arguments, resample=int(filter_), fillcolor=tuple(fill))
    return image


def one_operation(
    name: str, bicubic: bool, fill: list[int], size: tuple[int, int], count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures `(count, 3, height, width)` uint8, what timm's operation makes of them, and the plans for it.

    The magnitudes are spread over the whole range.
    """
    options = {"img_mean": tuple(fill), "magnitude_std": 4.0}
    options["interpolation"] = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    operation = auto_augment.AugmentOp(name, prob=1.0, magnitude=5, hparams=options)
    if name == "Posterize":
        operation.aug_fn = posterize
    images, expected, plans = [smooth_picture(seed, size[::-1]) for seed in range(count)], [], []
    for seed, image in enumerate(images):
        with seeded(seed):
            expected.append(operation(image))
    layer = drawing(auto_augment.RandAugment([operation], num_layers=1))
    for seed in range(count):
        with seeded(seed):
            plans.append(Draws(layer, None, size).plan())
    return stacked(images), stacked(expected), torch.stack(plans)
