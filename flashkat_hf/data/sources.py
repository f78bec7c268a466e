"""Labelled images for training and evaluation, from one name: `open_data`.

Needs the extra `train`. What can be wrong with the data is found before any other work starts, as far as that
does not take decoding every image.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from PIL import Image

from ..messages import extra
from .hub_datasets import is_saved, open_dataset
from .samples import (
    IMAGE_SUFFIXES,
    DataError,
    Examples,
    ImageData,
    Paths,
    check_classes,
    check_labels,
    header,
    unreadable,
)
from .shards import is_shards, open_shards

PARQUET = ("*.parquet", "*/*.parquet")  # where a data set's files stand
CONTENTS = 2**28  # bytes: up to so many the fingerprint reads the files, beyond it their names and sizes


def open_data(
    source: str | os.PathLike | None,
    *,
    rank: int = 0,
    world_size: int = 1,
    streaming: bool = False,
    skip_corrupt: bool = False,
    subset: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    shuffle_buffer: int = 1000,
) -> ImageData:
    """The training and the test split of a source, checked.

    Args:
        source: None or "digits": scikit-learn's digits. A folder with `train/` and `val/`, of a folder for
            each class: `load_image_folder`. A folder or brace pattern of tar files: WebDataset,
            `shards.open_shards`. A folder that `datasets` saved, a folder of Parquet files, or a Hub id:
            `hub_data.open_dataset`.
        rank: of this process; processes share the checks.
        world_size: number of processes.
        streaming: read a data set of `datasets` as a stream. WebDataset always is one.
        skip_corrupt: pass over images that cannot be read, instead of ending.
        subset: of `datasets`: name of the configuration.
        revision: of a Hub id: branch, tag or commit.
        image_column: of `datasets`; default: found by its type.
        label_column: likewise.
        class_names: of `datasets` and WebDataset, where they do not say; by index.
        train_split: of `datasets` and WebDataset; default: train.
        test_split: likewise; default: the first of validation, val and test.
        train_size: number of images, for streams of `datasets` that do not know it; training has to.
        test_size: the same for the test split.
        shuffle_buffer: undecoded images among which a stream's shuffle draws, in each worker.

    Raises:
        DataError: the source is missing, empty, or not what its kind has to be, or has no such option; in one
            line.
        ImportError: a package of the extra `train` is missing.
    """
    named = {"class_names": class_names, "train_split": train_split, "test_split": test_split}
    columns = {"image_column": image_column, "label_column": label_column}
    sizes = {"train_size": train_size, "test_size": test_size}
    of_datasets = {"subset": subset, "revision": revision, **columns, **sizes}
    if source is None or source == "digits":
        _refuse("the digits take", of_datasets | named | {"streaming": streaming})
        return load_digits()
    text, path = os.fspath(source), Path(source)
    shared: dict[str, Any] = {**named, "skip_corrupt": skip_corrupt, "buffer": shuffle_buffer}
    if is_shards(text):
        _refuse(f"{text} holds WebDataset shards, which take", of_datasets)
        return open_shards(text, show=rank == 0, **shared)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.exists() and not path.parent.exists()
    if on_hub or (path.is_dir() and (is_saved(path) or any(any(path.glob(pattern)) for pattern in PARQUET))):
        return open_dataset(text, streaming=streaming, world_size=world_size, **of_datasets, **shared)
    _refuse(
        f"{text} is no data set of datasets, and image folders take",
        of_datasets | named | {"streaming": streaming},
    )
    return load_image_folder(source, rank, world_size, skip_corrupt)


def _refuse(what: str, options: dict[str, Any]) -> None:
    """Options that a source does not have.

    Raises:
        DataError: some are given.
    """
    if given := [name for name, value in options.items() if value]:
        raise DataError(f"{what} no {', '.join(given)}")


def load_digits() -> ImageData[Examples]:
    """The 1,797 scanned 8x8 digits that scikit-learn ships.

    A fifth of each class is held out, always the same.
    """
    datasets, selection = extra("sklearn.datasets"), extra("sklearn.model_selection")
    digits = datasets.load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    images = [Image.fromarray(digit).convert("RGB") for digit in pixels]
    labels = [int(label) for label in digits.target]
    train, test = selection.train_test_split(
        range(len(images)), test_size=0.2, stratify=labels, random_state=0
    )
    splits = [Examples([images[i] for i in split], [labels[i] for i in split]) for split in (train, test)]
    fingerprint = hashlib.sha256(
        pixels.tobytes() + digits.target.tobytes() + bytes(str(test), "ascii")
    ).hexdigest()
    return ImageData(splits[0], splits[1], [str(name) for name in digits.target_names], fingerprint)


def load_image_folder(
    root: str | os.PathLike, rank: int = 0, world_size: int = 1, skip_corrupt: bool = False
) -> ImageData[Examples]:
    """`root/train/<class>/*` and `root/val/<class>/*`, with the header of every image checked.

    Images may stand in sub-folders of a class's folder. Names that start with a dot are passed over.

    Args:
        root: the folder.
        rank: of this process; processes that load one folder share the checks.
        world_size: number of such processes.
        skip_corrupt: do not check; the splits pass over images that cannot be read.

    Raises:
        DataError: a folder is missing or has no images, there are fewer than two classes, the splits have
            different classes, or a file is no image; the message names it.
    """
    root, names = Path(root), {}
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise DataError(
                f"{root} must hold train/ and val/, with a sub-folder for each class; {split}/ is missing"
            )
        names[split] = sorted(path.name for path in (root / split).glob("[!.]*") if path.is_dir())
    class_names = check_classes(names["train"], str(root / "train"))
    for one, other in (("train", "val"), ("val", "train")):
        if only := sorted(set(names[one]) - set(names[other])):
            raise DataError(f"{root / one} has classes that {root / other} has not: {', '.join(only)}")
    splits = [_list_images(root / split, class_names, skip_corrupt) for split in ("train", "val")]
    paths = [str(path) for split in splits for path in split.images]
    if not skip_corrupt:
        _check_headers(paths[rank::world_size], show=rank == 0)
    return ImageData(splits[0], splits[1], class_names, fingerprint_files(paths, root))


def _list_images(folder: Path, class_names: list[str], skip_corrupt: bool) -> Examples:
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
    return Examples(Paths(images), check_labels(labels, len(class_names), str(folder)), skip_corrupt)


def _check_headers(paths: Sequence[str], show: bool) -> None:
    tqdm = extra("tqdm").tqdm
    with ThreadPool(16) as pool:  # waits for the disk, not for the processor
        results = pool.imap(_header_error, paths, chunksize=64)
        bar = tqdm(results, total=len(paths), desc="checking images", unit="image", delay=2, disable=not show)
        errors = [error for error in bar if error]
    if errors:
        others = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
        raise DataError(errors[0] + others)


def _header_error(path: str) -> str | None:
    try:
        with header(path):
            return None
    except Exception as error:
        return str(unreadable(path, None, error))


def fingerprint_files(paths: Iterable[str], root: str | os.PathLike) -> str:
    """SHA-256 of the files' names below `root` and their sizes, and of their contents up to `CONTENTS` bytes in all."""
    files = [(os.path.relpath(path, root), os.path.getsize(path)) for path in paths]
    digest = hashlib.sha256(repr(files).encode("utf-8", "surrogateescape"))
    if sum(size for _, size in files) <= CONTENTS:
        for name, _ in files:
            digest.update(Path(root, name).read_bytes())
    return digest.hexdigest()
