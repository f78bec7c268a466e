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
from .samples import (
    DataError,
    Examples,
    ImageData,
    Partition,
    Sample,
    Unusable,
    and_more,
    check_classes,
    check_labels,
    normalised,
)

TEST_SPLITS = ("validation", "val", "test")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")  # where no column says that it has classes
NO_LABEL = Unusable("its row has no label")
STREAM_SHARDS = 64  # of a saved data set that is streamed, for each process


@dataclass(frozen=True)
class Column(Sequence):
    """The images of a map-style data set, not decoded: the bytes of files, or paths.

    Attributes:
        dataset: `datasets.Dataset` of undecoded images.
        name: of its column.
        unlabelled: rows without a label, whose images cannot be used.
    """

    dataset: Any
    name: str
    unlabelled: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> bytes | str | Unusable:  # type: ignore[override]
        return NO_LABEL if index in self.unlabelled else _encoded(self.dataset[int(index)][self.name])


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
            name = (row[image_column] or {}).get("path") or f"number {number}"
            label, name = row[label_column], f"{name} of {self.name}"
            if _missing(label):
                if not self.skip_corrupt:
                    raise DataError(f"{name} has no label")
                yield Sample(NO_LABEL, 0, name)
            else:
                yield Sample(_encoded(row[image_column]), self._index(label, name), name)

    def _index(self, label: Any, name: str) -> int:
        value = _value(label, name)
        index = self.indices.get(value, -1) if isinstance(value, str) else value
        if not 0 <= index < len(self.indices):
            raise DataError(f"label {label} of {name} is not one of the {len(self.indices)} classes")
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
    if streaming:  # of files, `cast_column` would come after decoding
        train, test = (part.decode(False) for part in (train, test))
    image = extra("datasets").Image(decode=False)
    train, test = (
        part.select_columns(list(columns)).cast_column(columns[0], image) for part in (train, test)
    )
    classes, bare = _classes(train, test, columns[1], source, names, class_names)

    def split(part: Any, size: int | None, name: str) -> Any:
        if not streaming:
            return _examples(part, columns, classes, bare, name, skip_corrupt)
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
    columns = image or images[0], label or labels[0]
    for kind, name, fits in zip(("images", "labels"), columns, (_holds_images, _holds_labels), strict=True):
        if not fits(features[name]):
            holds = getattr(features[name], "dtype", None) or type(features[name]).__name__
            raise DataError(
                f"the column {name} of {source} holds no {kind} but {holds}; it has {', '.join(features)}"
            )
    return columns


def _holds_images(feature: Any) -> bool:
    """Return whether a column has images, files' bytes or paths, or pixels."""
    if isinstance(feature, dict):  # as `datasets` writes images
        return {"bytes", "path"} >= feature.keys()
    names = ("string", "large_string", "binary", "large_binary")
    datasets = extra("datasets")
    return isinstance(feature, (datasets.Image, datasets.List)) or getattr(feature, "dtype", None) in names


def _holds_labels(feature: Any) -> bool:
    datasets = extra("datasets")
    if not isinstance(feature, datasets.Value):
        return isinstance(feature, datasets.ClassLabel)
    return feature.dtype.startswith(("int", "uint", "float", "bool", "string", "large_string"))


def _classes(
    train: Any, test: Any, column: str, source: str, splits: tuple[str, str], given: Sequence[str] | None
) -> tuple[list[str], bool]:
    """Return the class names, and whether they are the numbers that the column has as labels."""
    bare = False
    names = [getattr(part.features[column], "names", None) for part in (train, test)]
    if given is None and names[0] != names[1]:
        only = sorted(set(names[0] or ()) ^ set(names[1] or ()))
        difference = f": only one of them has {', '.join(only)}" if only else ", or in another order"
        raise DataError(f"{splits[0]} and {splits[1]} of {source} have different classes{difference}")
    if given is None and names[0] is None:
        if not hasattr(train, "to_iterable_dataset"):
            raise DataError(f"the column {column} of {source} has no class names; give them (class_names)")
        of = f"{splits[0]} of {source}"
        values = {_value(label, of) for label in train.unique(column) if not _missing(label)}
        bare = not any(isinstance(value, str) for value in values)
        if negative := sorted(value for value in values if isinstance(value, int) and value < 0):
            raise DataError(f"label {negative[0]} of {of} is negative")
        given = [str(value) for value in sorted(values)]
    return check_classes(given or names[0] or (), source), bare


def _examples(
    part: Any, columns: tuple[str, str], classes: list[str], bare: bool, name: str, skip_corrupt: bool
) -> Examples:
    """Return a split; `bare` says that its labels are the classes' names written as numbers, no indices."""
    if not len(part):
        raise DataError(f"{name} has no images")
    labels = list(part[columns[1]])
    missing = [index for index, label in enumerate(labels) if _missing(label)]
    if missing and not skip_corrupt:
        raise DataError(f"number {missing[0]} of {name} has no label{and_more(missing)}")
    known = {text: index for index, text in enumerate(classes)}
    indices = dict.fromkeys(missing, 0)
    unknown = set()
    for index, label in enumerate(labels):
        if index not in indices:
            value = _value(label, f"number {index} of {name}")
            by_name = bare or isinstance(value, str)
            indices[index] = known.get(str(value), -1) if by_name else int(value)
            if by_name and str(value) not in known:
                unknown.add(str(value))
    if unknown:
        raise DataError(f"{name} has classes that the training split has not: {', '.join(sorted(unknown))}")
    indices = [indices[index] for index in range(len(labels))]
    images = Column(part, columns[0], frozenset(missing))
    return Examples(images, check_labels(indices, len(classes), name), skip_corrupt, name)


def _size(part: Any) -> int | None:
    if hasattr(part, "__len__"):
        return len(part)
    splits, name = part.info.splits or {}, str(part.split or "")
    return splits[name].num_examples if name in splits else None


def _missing(label: Any) -> bool:
    return label is None or label != label  # NaN


def _value(label: Any, name: str) -> int | str:
    """Return a label as a text, composed as class names are, or as a whole number.

    Raises:
        DataError: it is neither; a float may be a whole number.
    """
    if isinstance(label, str):
        return normalised(label, name)
    if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
        return int(label)
    raise DataError(f"label {label} of {name} is neither a text nor a whole number")


def _encoded(value: dict[str, Any] | None) -> bytes | str | Unusable:
    """Return a row's image as the bytes of a file, or as the path of one on this machine."""
    if value is None or (value["bytes"] is None and value["path"] is None):
        return Unusable("its row has no image")
    if value["bytes"] is not None:
        return value["bytes"]
    path = value["path"]
    if "://" not in path:
        return path
    try:
        with extra("datasets.utils.file_utils").xopen(path, "rb") as file:  # any file system of fsspec
            return file.read()
    except FileNotFoundError:
        return Unusable(f"{path}: no such file")
    except Exception as error:  # file systems' errors have no common class
        return Unusable(f"{path}: {one_line(error)}")


def _fingerprint(source: str, revision: str | None, parts: tuple) -> str:
    """Return a hash of the data set's own fingerprint, or of its files, or the commit of a Hub stream."""
    about = [getattr(part, "_fingerprint", None) for part in parts]
    if None in about:
        if not (path := Path(source)).is_dir():
            return str(HfApi().dataset_info(source, revision=revision).sha)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        about = [(str(file), os.path.getsize(file)) for file in files]
    return hashlib.sha256(repr(about).encode()).hexdigest()
