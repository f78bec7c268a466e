"""Labelled images for training: scikit-learn's digits, or a folder with one sub-folder for each class.

Needs the extra `train`. Images are checked before any work starts; what evaluation sees is what the model's own image
processor makes, so an accuracy measured here is the one that `pipeline` gives.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Examples(NamedTuple):
    """Images, as files or in memory, and the index of each one's class."""

    images: Sequence[Path | Image.Image]
    labels: Sequence[int]


class ImageData(NamedTuple):
    """The two splits, and the names of the classes in the order of their indices."""

    train: Examples
    test: Examples
    class_names: list[str]


class ImageDataset(Dataset):
    """`{"pixel_values": transform(image), "labels": index}`; images are opened as RGB when asked for."""

    def __init__(self, examples: Examples, transform: Callable[[Image.Image], Tensor]):
        self.examples, self.transform = examples, transform

    def __len__(self) -> int:
        return len(self.examples.labels)

    def __getitem__(self, index: int) -> dict:
        image = self.examples.images[index]
        image = image if isinstance(image, Image.Image) else open_image(image)
        return {"pixel_values": self.transform(image), "labels": self.examples.labels[index]}


def open_image(path: Path) -> Image.Image:
    """The whole image as RGB.

    Raises:
        ValueError: the file is missing, truncated or no image; the message names it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def load_digits() -> ImageData:
    """The 1,797 scanned 8x8 digits that scikit-learn ships; every class gives a fifth to the test split."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits: Any = load()
    images = [Image.fromarray((pixels * 255 / 16).round().astype("uint8")).convert("RGB") for pixels in digits.images]
    train, test = train_test_split(range(len(images)), test_size=0.2, stratify=digits.target, random_state=0)
    splits = (Examples([images[i] for i in split], [int(digits.target[i]) for i in split]) for split in (train, test))
    return ImageData(*splits, class_names=[str(name) for name in digits.target_names])


def load_image_folder(root: Path) -> ImageData:
    """`root/train/<class>/*` and `root/val/<class>/*`; the header of every image is read.

    Raises:
        ValueError: a folder is missing or has no images, there are fewer than two classes, the splits have different
            classes, or a file is no image; the message names it.
    """
    names = {}
    for split in ("train", "val"):
        folder = root / split
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; {root} must hold train/ and val/, a sub-folder for each class")
        names[split] = sorted(path.name for path in folder.iterdir() if path.is_dir())
    class_names = names["train"]
    if len(class_names) < 2:
        raise ValueError(
            f"{root / 'train'} has {len(class_names)} class folders {class_names}; at least two are needed"
        )
    if names["val"] != class_names:
        only = sorted(set(names["val"]) ^ set(class_names))
        raise ValueError(f"train/ and val/ of {root} have different classes; only one of them has {', '.join(only)}")
    splits = [_list_images(root / split, class_names) for split in ("train", "val")]
    _check_headers([path for split in splits for path in split.images if isinstance(path, Path)])
    return ImageData(*splits, class_names=class_names)


def _list_images(folder: Path, class_names: list[str]) -> Examples:
    images, labels = [], []
    for label, name in enumerate(class_names):
        paths = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise ValueError(f"{folder / name} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        images += paths
        labels += [label] * len(paths)
    return Examples(images, labels)


def _check_headers(paths: list[Path]) -> None:
    from tqdm import tqdm

    with ThreadPoolExecutor() as pool:
        bar = tqdm(pool.map(_check_header, paths), total=len(paths), desc="checking images", delay=2)
        for _ in bar:
            pass


def _check_header(path: Path) -> None:
    try:
        with Image.open(path):
            pass
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def evaluation_transform(processor) -> Callable[[Image.Image], Tensor]:
    """The image processor itself, for one image: `(channels, height, width)` float32."""
    return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]


def training_transform(processor, flip: bool = True) -> Callable[[Image.Image], Tensor]:
    """Random crops to the processor's crop size, normalised as it does.

    Args:
        processor: a `make_image_processor`'s.
        flip: photographs: random resized crop and flip. Without it, for digits and other signs: small random shifts,
            turns and scalings.
    """
    from torchvision.transforms import v2

    size = [processor.crop_size["height"], processor.crop_size["width"]]
    bicubic = v2.InterpolationMode.BICUBIC
    if flip:
        augment = [v2.RandomResizedCrop(size, interpolation=bicubic), v2.RandomHorizontalFlip()]
    else:
        shift = v2.RandomAffine(
            [-10, 10], translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR
        )
        augment = [v2.Resize(size, interpolation=bicubic), shift]
    return v2.Compose(
        [
            v2.ToImage(),
            *augment,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(processor.image_mean, processor.image_std),
        ]
    )
