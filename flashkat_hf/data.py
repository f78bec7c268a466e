"""Labelled images for training: scikit-learn's digits, or a folder with one sub-folder for each class.

Needs the extra `train`. Images are checked before any work starts; what evaluation sees is what the model's own image
processor makes, so an accuracy measured here is the one that `pipeline` gives.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class DataError(ValueError):
    """Data that a user has to mend; the message is one line and names the file or folder."""


class Examples(NamedTuple):
    """Images, as paths or in memory, and the index of each one's class."""

    images: Sequence[str | Image.Image]
    labels: Sequence[int]


class ImageData(NamedTuple):
    """The two splits, and the names of the classes in the order of their indices."""

    train: Examples
    test: Examples
    class_names: list[str]


class ImageDataset(Dataset):
    """`{"pixel_values": transform(image), "labels": index}`; files are opened as RGB when asked for."""

    def __init__(self, examples: Examples, transform: Callable[[Image.Image], Tensor]):
        self.examples, self.transform = examples, transform

    def __len__(self) -> int:
        return len(self.examples.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.transform(self.image(index)), "labels": self.examples.labels[index]}

    def image(self, index: int) -> Image.Image:
        image = self.examples.images[index]
        return image if isinstance(image, Image.Image) else open_image(image)


def open_image(path: str | Path) -> Image.Image:
    """The whole image, upright and as RGB, as transformers' pipelines open it.

    Raises:
        DataError: the file is missing, truncated or no image; the message names it.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # PIL's decoders raise more than OSError for broken files
        raise DataError(_unreadable(path, error)) from error


def load_digits() -> ImageData:
    """The 1,797 scanned 8x8 digits that scikit-learn ships; a fifth of each class is held out, always the same."""
    datasets, selection = _extra("sklearn.datasets"), _extra("sklearn.model_selection")
    digits = datasets.load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    images = [Image.fromarray(digit).convert("RGB") for digit in pixels]
    labels = [int(label) for label in digits.target]
    train, test = selection.train_test_split(range(len(images)), test_size=0.2, stratify=labels, random_state=0)
    splits = (Examples([images[i] for i in split], [labels[i] for i in split]) for split in (train, test))
    return ImageData(*splits, class_names=[str(name) for name in digits.target_names])


def load_image_folder(root: str | Path, rank: int = 0, world_size: int = 1) -> ImageData:
    """`root/train/<class>/*` and `root/val/<class>/*`, with the header of every image checked.

    Images may stand in sub-folders of a class's folder. Names that start with a dot are passed over.

    Args:
        root: the folder.
        rank: of this process; processes that load one folder share the checks.
        world_size: number of such processes.

    Raises:
        DataError: a folder is missing or has no images, there are fewer than two classes, the splits have different
            classes, or a file is no image; the message names it.
    """
    root, names = Path(root), {}
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise DataError(f"{root} must hold train/ and val/, with a sub-folder for each class; {split}/ is missing")
        names[split] = sorted(path.name for path in (root / split).glob("[!.]*") if path.is_dir())
    class_names = names["train"]
    if len(class_names) < 2:
        found = f"only the class {class_names[0]}" if class_names else "no class folders"
        raise DataError(f"{root / 'train'} holds {found}; at least two are needed")
    for one, other in (("train", "val"), ("val", "train")):
        if only := sorted(set(names[one]) - set(names[other])):
            raise DataError(f"{root / one} has classes that {root / other} has not: {', '.join(only)}")
    splits = [_list_images(root / split, class_names) for split in ("train", "val")]
    paths = [path for split in splits for path in split.images if isinstance(path, str)]
    _check_headers(paths[rank::world_size], show=rank == 0)
    return ImageData(*splits, class_names=class_names)


def _list_images(folder: Path, class_names: list[str]) -> Examples:
    images, labels = [], []
    for label, name in enumerate(class_names):
        paths = sorted(
            os.path.join(parent, file)
            for parent, _, files in os.walk(folder / name, followlinks=True)
            for file in files
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")
        )
        if not paths:
            raise DataError(f"{folder / name} has no images ({', '.join(IMAGE_SUFFIXES)})")
        images += paths
        labels += [label] * len(paths)
    return Examples(images, labels)


def _check_headers(paths: list[str], show: bool) -> None:
    tqdm = _extra("tqdm").tqdm
    with ThreadPool(16) as pool:  # waits for the disk, not for the processor
        results = pool.imap(_header_error, paths, chunksize=64)
        bar = tqdm(results, total=len(paths), desc="checking images", unit="image", delay=2, disable=not show)
        errors = [error for error in bar if error]
    if errors:
        others = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
        raise DataError(errors[0] + others)


def _header_error(path: str) -> str | None:
    try:
        with Image.open(path):
            return None
    except Exception as error:
        return _unreadable(path, error)


def _unreadable(path: str | Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        reason = "not a known image format"
    else:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"cannot read the image {path}: {reason}"


def evaluation_transform(processor) -> Callable[[Image.Image], Tensor]:
    """The image processor itself, for one image: `(channels, height, width)` float32."""
    return partial(_process, processor)


def _process(processor, image: Image.Image) -> Tensor:  # a module's function: workers started afresh can unpickle it
    return processor(image, return_tensors="pt")["pixel_values"][0]


def training_transform(processor, flip: bool = True) -> Callable[[Image.Image], Tensor]:
    """Random crops to the processor's crop size, normalised as it does.

    Args:
        processor: a `make_image_processor`'s.
        flip: photographs: random resized crop and flip. Without it, for digits and other signs: small random shifts,
            turns and scalings.
    """
    v2 = _extra("torchvision.transforms.v2")
    crop = [processor.crop_size["height"], processor.crop_size["width"]]
    bicubic = v2.InterpolationMode.BICUBIC
    if flip:
        augment = [v2.RandomResizedCrop(crop, interpolation=bicubic), v2.RandomHorizontalFlip()]
    else:
        moved = v2.RandomAffine(
            [-10, 10], translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR
        )
        augment = [v2.Resize(processor.size["shortest_edge"], interpolation=bicubic), moved, v2.CenterCrop(crop)]
    # the augmentation works on the PIL image: for small ones a third of the time that it takes on tensors
    to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*augment, *to_tensor, v2.Normalize(processor.image_mean, processor.image_std)])


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is missing: pip install 'flashkat_hf[train]' ({error})") from error
