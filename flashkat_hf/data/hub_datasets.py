"""Data sets of Hugging Face's `datasets`, from a folder or the Hub, with random access or streamed."""

import hashlib
import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..messages import extra, one_line
from .samples import DataError, Examples, ImageData, Partition, Sample, check_classes, check_labels

TEST_SPLITS = ("validation", "val", "test")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")  # where no column says that it has classes
STREAM_SHARDS = 64  # of a saved data set that is streamed, for each process


@dataclass(frozen=True)
class Column(Sequence):
    """The images of a map-style data set, not decoded: the bytes of files, or paths."""

    dataset: Any
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> bytes | str:  # type: ignore[override]
        return _encoded(self.dataset[int(index)][self.name])


@dataclass(frozen=True)
class DatasetStream:
    """A split of `datasets` that is streamed; a `Stream`.

    Attributes:
        dataset: `datasets.IterableDataset` of undecoded images and labels.
        columns: names of the image's and the label's column.
        indices: index of each class name; labels are looked up in it where they are texts.
        num_images: number of images over all processes, or None.
        name: what messages call it.
        skip_corrupt: as in `Examples`.
        buffer: images, not decoded, among which the shuffle draws.
        start_method: as in `Stream`.
    """

    dataset: Any
    columns: tuple[str, str]
    indices: dict[str, int]
    num_images: int | None
    name: str
    skip_corrupt: bool = False
    buffer: int = 1000
    start_method: str | None = (
        "forkserver"  # a forked worker can hang: pyarrow and fsspec have threads by then
    )

    def most_workers(self, world_size: int) -> int:
        """Return how many workers can have a shard: `datasets` gives each of them whole ones.

        Processes have shards of their own where the numbers divide.
        """
        shards = self.dataset.num_shards
        return shards // world_size if shards % world_size == 0 else shards

    def samples(self, shuffle: tuple[int, int] | None, partition: Partition) -> Iterator[Sample]:
        distributed, dataset = extra("datasets.distributed"), self.dataset
        if shuffle is not None:
            options = {}
            if "max_buffer_input_shards" in inspect.signature(dataset.shuffle).parameters:
                # some releases count the shards that one buffer mixes as one: workers would have none
                shards = dataset.num_shards // (partition.world_size * partition.num_workers)
                options["max_buffer_input_shards"] = max(1, min(10, shards))
            dataset = dataset.shuffle(seed=shuffle[0], buffer_size=self.buffer, **options)
        dataset = distributed.split_dataset_by_node(dataset, partition.rank, partition.world_size)
        dataset.set_epoch(shuffle[1] if shuffle else 0)  # last: each step before makes a data set of epoch 0
        image_column, label_column = self.columns
        for number, row in enumerate(dataset):  # of a worker's own part, which datasets takes by itself
            image = _encoded(row[image_column])
            name = image if isinstance(image, str) else row[image_column].get("path") or f"number {number}"
            yield Sample(image, self._index(row[label_column], name), f"{name} of {self.name}")

    def _index(self, label: Any, name: str) -> int:
        index = self.indices.get(label, -1) if isinstance(label, str) else -1 if label is None else int(label)
        if not 0 <= index < len(self.indices):
            known = f"one of the {len(self.indices)} classes"
            raise DataError(f"{self.name}: label {label} of {name} is not {known}")
        return index


def is_saved(path: Path) -> bool:
    """Return whether `datasets.save_to_disk` wrote this folder."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def open_dataset(
    source: str,
    *,
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    world_size: int = 1,
    skip_corrupt: bool = False,
    buffer: int = 1000,
) -> ImageData[Examples] | ImageData[DatasetStream]:
    """Open the splits of a folder that `save_to_disk` wrote, of a folder of Parquet files, or of a Hub id.

    The arguments are those of `open_data`; streams of texts or bare numbers need `class_names`. `world_size`
    sets the number of parts that a saved data set is streamed in.

    Raises:
        DataError: it cannot be loaded; a split, a column, class names or images are missing; the splits have
            different classes; a label is outside the range.
    """
    whole = _load(source, subset, revision, streaming)
    names = _pick_splits(whole, source, train_split, test_split)
    train, test = (whole[name] for name in names)
    fingerprint = _fingerprint(source, revision, (train, test))
    sizes = train_size or _size(train), test_size or _size(test)
    if streaming:
        train, test = (_as_stream(part, world_size) for part in (train, test))
    columns = _columns(train.features, source, image_column, label_column)
    image = extra("datasets").Image(decode=False)
    train, test = (
        part.select_columns(list(columns)).cast_column(columns[0], image) for part in (train, test)
    )
    classes = _classes(train, test, columns[1], source, names, class_names)

    def split(part: Any, size: int | None, name: str) -> Any:
        if not streaming:
            return _examples(part, columns, classes, name, skip_corrupt)
        indices = {text: index for index, text in enumerate(classes)}
        return DatasetStream(part, columns, indices, size, name, skip_corrupt, buffer)

    train = split(train, sizes[0], f"{names[0]} of {source}")
    test = split(test, sizes[1], f"{names[1]} of {source}")
    return ImageData(train, test, classes, fingerprint)


def _load(source: str, subset: str | None, revision: str | None, streaming: bool) -> Any:
    datasets, path = extra("datasets"), Path(source)
    try:
        if path.is_dir() and is_saved(path):
            return datasets.load_from_disk(source)
        return datasets.load_dataset(source, subset, revision=revision, streaming=streaming)
    except Exception as error:  # the Hub's, fsspec's and pyarrow's errors have no common class
        raise DataError(f"cannot load the data set {source}: {one_line(error)}") from error


def _pick_splits(whole: Any, source: str, train: str | None, test: str | None) -> tuple[str, str]:
    if not isinstance(whole, dict):
        raise DataError(f"{source} is one split; save a DatasetDict with train and validation")
    train = train or "train"
    test = test or next((name for name in TEST_SPLITS if name in whole), TEST_SPLITS[0])
    for name in (train, test):
        if name not in whole:
            raise DataError(f"{source} has no split {name}; it has {', '.join(whole)}")
    return train, test


def _as_stream(part: Any, world_size: int) -> Any:
    """Return a split as a stream whose features are known."""
    if hasattr(part, "to_iterable_dataset"):  # saved on this machine
        return part.to_iterable_dataset(num_shards=max(1, min(len(part), STREAM_SHARDS * world_size)))
    return part._resolve_features() if part.features is None else part


def _columns(features: Any, source: str, image: str | None, label: str | None) -> tuple[str, str]:
    datasets = extra("datasets")
    for name in (image, label):
        if name is not None and name not in features:
            raise DataError(f"{source} has no column {name}; it has {', '.join(features)}")
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [name for name in LABEL_COLUMNS if name in features][:1]
    for kind, given, names in (("image", image, images), ("label", label, labels)):
        if given is None and len(names) != 1:
            columns = f"several {kind} columns ({', '.join(names)})" if names else f"no {kind} column"
            raise DataError(f"{source} has {columns}; name one of {', '.join(features)} ({kind}_column)")
    return image or images[0], label or labels[0]


def _classes(
    train: Any, test: Any, column: str, source: str, splits: tuple[str, str], given: Sequence[str] | None
) -> list[str]:
    names = [getattr(part.features[column], "names", None) for part in (train, test)]
    if given is None and names[0] != names[1]:
        only = sorted(set(names[0] or ()) ^ set(names[1] or ()))
        difference = f": only one of them has {', '.join(only)}" if only else ", or in another order"
        raise DataError(f"{splits[0]} and {splits[1]} of {source} have different classes{difference}")
    if given is None and names[0] is None:
        if not hasattr(train, "to_iterable_dataset"):
            raise DataError(f"the column {column} of {source} has no class names; give them (class_names)")
        labels = set(train[column])
        if None in labels:
            raise DataError(f"{splits[0]} of {source} has images without a label")
        texts = all(isinstance(label, str) for label in labels)
        given = sorted(labels) if texts else [str(i) for i in range(max(map(int, labels), default=-1) + 1)]
    return check_classes(given or names[0] or (), source)


def _examples(
    part: Any, columns: tuple[str, str], classes: list[str], name: str, skip_corrupt: bool
) -> Examples:
    if not len(part):
        raise DataError(f"{name} has no images")
    labels = list(part[columns[1]])
    indices = {text: index for index, text in enumerate(classes)}
    if isinstance(labels[0], str):
        if unknown := sorted(set(labels) - indices.keys()):
            raise DataError(f"{name} has classes that the training split has not: {', '.join(unknown)}")
        labels = [indices[label] for label in labels]
    checked = check_labels([-1 if label is None else label for label in labels], len(classes), name)
    return Examples(Column(part, columns[0]), checked, skip_corrupt, name)


def _size(part: Any) -> int | None:
    if hasattr(part, "__len__"):
        return len(part)
    splits, name = part.info.splits or {}, str(part.split or "")
    return splits[name].num_examples if name in splits else None


def _encoded(value: dict[str, Any]) -> bytes | str:
    return value["bytes"] if value["bytes"] is not None else value["path"]


def _fingerprint(source: str, revision: str | None, parts: tuple) -> str:
    """Return a hash of the data set's own fingerprint, or of its files, or the commit of a Hub stream."""
    about = [getattr(part, "_fingerprint", None) for part in parts]
    if None in about:
        if not (path := Path(source)).is_dir():
            return str(HfApi().dataset_info(source, revision=revision).sha)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        about = [(str(file), os.path.getsize(file)) for file in files]
    return hashlib.sha256(repr(about).encode()).hexdigest()
