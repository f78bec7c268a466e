"""Labelled images for training and evaluation, from one name: `open_data` (extra `train`).

What can be wrong with the data is found before any other work starts, as far as that does not take decoding
every image.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .digits import load_digits
from .hub_datasets import is_saved, open_dataset
from .image_folder import is_image_folder, load_image_folder
from .names import is_hub_id
from .samples import DataError, ImageData
from .shards import is_shards, open_shards

PARQUET = ("*.parquet", "*/*.parquet")  # where a data set's files stand


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
    """Return the training and the test split of a source, checked.

    Args:
        source: None or "digits": scikit-learn's digits. A folder with images in `train/` and `val/`, in a
            folder for each class, whatever stands beside them: `load_image_folder`. A folder or brace pattern
            of tar files: WebDataset, `shards.open_shards`. A folder that `datasets` saved, a folder of
            Parquet files, or a Hub id: `hub_datasets.open_dataset`.
        rank: index of this process; processes share the checks.
        world_size: number of processes.
        streaming: read a data set of `datasets` as a stream. WebDataset always is one.
        skip_corrupt: pass over images that cannot be read, instead of ending.
        subset: name of a configuration; for `datasets`.
        revision: branch, tag or commit; for a Hub id.
        image_column: name of the column; for `datasets`; default: found by its type.
        label_column: likewise.
        class_names: names by index, where `datasets` and WebDataset do not say.
        train_split: name of the split; for `datasets` and WebDataset; default: train.
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
    of_any = of_datasets | named | {"streaming": streaming}
    if source is None or source == "digits":
        _refuse("the digits take", of_any)
        return load_digits()
    text, path = os.fspath(source), Path(source)
    shared: dict[str, Any] = {**named, "skip_corrupt": skip_corrupt, "buffer": shuffle_buffer}
    pictures = is_image_folder(path)
    if not pictures and is_shards(text):
        _refuse(f"{text} holds WebDataset shards, which take", of_datasets)
        return open_shards(text, show=rank == 0, **shared)
    parquet = not pictures and any(any(path.glob(pattern)) for pattern in PARQUET)
    if is_hub_id(text) or (path.is_dir() and (is_saved(path) or parquet)):
        return open_dataset(text, streaming=streaming, world_size=world_size, **of_datasets, **shared)
    _refuse(f"{text} is no data set of datasets, and image folders take", of_any)
    return load_image_folder(source, rank, world_size, skip_corrupt)


def _refuse(beginning: str, options: dict[str, Any]) -> None:
    """Raise DataError if any of these options, which a source does not have, is given."""
    if given := [name for name, value in options.items() if value]:
        raise DataError(f"{beginning} no {', '.join(given)}")
