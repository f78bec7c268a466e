"""WebDataset shards: tar files of images and labels, read from one end to the other (extra `train`).

A sample is an image and its label: `name.jpg` and `name.cls`, or `name.json` with the field "label"; its
name ends at the last dot. The order of an epoch is the shards in random order, one after the other, cut into
equal parts; each worker reads its part through a shuffle buffer. So all images are shared out fairly whatever
the number of shards, and a worker reads at most one shard more than it has images for.
"""

import hashlib
import json
import os
import random
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..messages import extra, one_line
from .names import is_tar
from .samples import IMAGE_SUFFIXES, DataError, ImageData, Partition, Sample, check_classes, check_name
from .seeding import random_integer

logger = logging.get_logger(__name__)
SPLIT_NAMES = {"train": ("train", "training"), "test": ("val", "valid", "validation", "test")}
SPECIAL = re.compile(r"__[^/]*__($|/)")  # webdataset passes over such names


@dataclass(frozen=True)
class Shards:
    """A split in tar files; a `Stream`.

    Attributes:
        urls: paths of the tar files, in order, or what webdataset's `gopen` opens.
        sizes: number of images in each.
        class_names: names in the order of the labels.
        skip_corrupt: as in `Examples`.
        buffer: images, not decoded, among which the shuffle draws.
        start_method: as in `Stream`.
    """

    urls: Sequence[str]
    sizes: Sequence[int]
    class_names: Sequence[str]
    skip_corrupt: bool = False
    buffer: int = 1000
    start_method: str | None = None

    @property
    def num_images(self) -> int:
        return sum(self.sizes)

    def most_workers(self, world_size: int) -> int:
        return max(1, self.num_images // world_size)

    def samples(self, shuffle: tuple[int, int] | None, partition: Partition) -> Iterator[Sample]:
        order = list(range(len(self.urls)))
        if shuffle is not None:
            random.Random(random_integer(*shuffle)).shuffle(order)
        samples = self._read(order, *partition.bounds(self.num_images))
        if shuffle is not None:
            part = partition.rank * partition.num_workers + partition.worker
            generator = random.Random(random_integer(*shuffle, part))
            shuffled = extra("webdataset").shuffle(self.buffer, initial=self.buffer, rng=generator)
            samples = shuffled(samples)
        yield from samples

    def _read(self, order: list[int], first: int, last: int) -> Iterator[Sample]:
        """Yield the samples at the positions `[first, last)` of the shards in this order."""
        start = 0
        for shard in order:
            url, size = self.urls[shard], self.sizes[shard]
            low, high = max(first - start, 0), min(last - start, size)
            start += size
            if low < high:
                missing = high - low
                for sample in islice(read_shard(url), low, high):
                    missing -= 1
                    yield labelled(sample, self.class_names)
                if missing:
                    raise DataError(f"{url} has fewer images than the {size} that it should have")


def labelled(sample: dict[str, Any], class_names: Sequence[str]) -> Sample:
    """Return the image of webdataset's sample, with the index of its class.

    Raises:
        DataError: it has no label, or none of these classes.
    """
    images = [key for key in sample if f".{key}" in IMAGE_SUFFIXES]
    check_name(sample["__key__"], f"an image in {sample['__url__']}")
    name = f"{sample['__url__']}/{sample['__key__']}.{images[0]}"
    if len(images) > 1:
        raise DataError(f"{name} has a second image of the same name, .{images[1]}; a sample has one image")
    try:
        label = (
            sample["cls"].decode("utf-8-sig").strip()
            if "cls" in sample
            else json.loads(sample["json"])["label"]
        )
        index = _index(label, class_names)
    except (KeyError, TypeError, ValueError) as error:
        has_label = "cls" in sample or "json" in sample
        problem = "its label is none of the class names" if has_label else "it has none"
        expected = ".cls or .json with the field label is expected"
        raise DataError(f"no label for {name}: {problem}, {expected}") from error
    if index >= len(class_names):
        raise DataError(f"label {index} of {name} is not one of the {len(class_names)} classes")
    return Sample(sample[images[0]], index, name)


def _index(label: Any, class_names: Sequence[str]) -> int:
    """Return the index of a label: a text is a class name or, where no class name is a number, an index.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(label, str):
        text = unicodedata.normalize("NFC", label)
        if text in class_names or not text.isdecimal() or any(map(str.isdecimal, class_names)):
            return list(class_names).index(text)
    elif not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise ValueError(f"{label} is no index")
    return int(label)


def split_name(path: str) -> tuple[Any, Any]:
    """Return a file's name without its last suffix, and the suffix; None where it is hidden or has none."""
    stem, suffix = os.path.splitext(path)
    return (stem, suffix[1:]) if suffix and not os.path.basename(path).startswith(".") else (None, None)


def is_shards(source: str) -> bool:
    """Return whether a source is a pattern of tar files, or a folder that has some, also in `train/`."""
    path = Path(source)
    if path.is_dir():
        return any(path.glob("*.tar")) or any(path.glob("train/*.tar"))
    return is_tar(source)


def open_shards(
    source: str,
    *,
    class_names: Sequence[str] | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    skip_corrupt: bool = False,
    buffer: int = 1000,
    show: bool = True,
) -> ImageData[Shards]:
    """Open the splits of a folder of shards, or of a pattern: `data/{train-{000..146},val-{00..06}}.tar`.

    Shards belong to the split that their name begins with, or else that their folder is called. Class names
    come from `classes.json` (a list, or names by index, or indices by name) or `classes.txt` (one in each
    line) beside the shards. The numbers of images come from `sizes.json` beside them (by file name), else
    from the tar files, whose labels are checked then.

    The arguments are those of `open_data`; `show` shows a progress bar, where counting takes long.

    Raises:
        DataError: there are no shards of a split, no class names, or no images; a shard is missing or no tar
            file, or, of those that are counted, has an image without a label of the classes.
    """
    path = Path(source)
    if path.is_dir():
        urls, roots = sorted(map(str, path.rglob("*.tar"))), [str(path)]
    else:
        urls, roots = extra("webdataset.shardlists").expand_urls(source), []
    names = {
        "train": (train_split,) if train_split else SPLIT_NAMES["train"],
        "test": (test_split,) if test_split else SPLIT_NAMES["test"],
    }
    split_urls = {split: [url for url in urls if _belongs(url, names[split])] for split in names}
    for split in names:
        if not split_urls[split]:
            beginnings = " or ".join(names[split])
            raise DataError(f"{source} has no {split} shards: names that begin with {beginnings}")
    roots += list(dict.fromkeys(os.path.dirname(url) for url in urls))
    classes = check_classes(class_names or _class_names(roots, source), source)
    known = _read_first(roots, "sizes.json", json.loads) or {}
    sizes = _sizes([*split_urls["train"], *split_urls["test"]], known, classes, show)
    splits = {
        split: Shards(urls, [sizes[url] for url in urls], classes, skip_corrupt, buffer)
        for split, urls in split_urls.items()
    }
    for split, shards in splits.items():
        if not shards.num_images:
            raise DataError(f"the {split} shards of {source} have no images that Pillow reads")
    counts = [(os.path.basename(url), size) for url, size in sizes.items()]
    file_sizes = [os.path.getsize(url) for url in sizes if os.path.exists(url)]
    fingerprint = hashlib.sha256(repr([classes, counts, file_sizes]).encode()).hexdigest()
    return ImageData(splits["train"], splits["test"], classes, fingerprint)


def read_shard(url: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a tar file that have an image, as webdataset has them: bytes by suffix.

    Raises:
        DataError: the file is missing or damaged.
    """
    wds, tar = extra("webdataset"), extra("webdataset.tariterators")
    try:
        with wds.gopen(url) as stream:
            files = tar.tar_file_expander([{"url": url, "stream": stream}])
            for sample in tar.group_by_keys(files, keys=split_name):
                if any(f".{key}" in IMAGE_SUFFIXES for key in sample):
                    yield sample
    except (OSError, ValueError, tarfile.TarError) as error:
        raise DataError(f"cannot read the shard {url}: {_reason(error)}") from error


def _sizes(urls: list[str], known: dict[str, int], class_names: list[str], show: bool) -> dict[str, int]:
    sizes, others = {}, Counter()
    bar = extra("tqdm").tqdm(urls, desc="counting images", unit="shard", delay=2, disable=not show)
    for url in bar:
        name = os.path.basename(url)
        if name in known:
            sizes[url] = int(known[name])
        elif "://" in url or url.startswith("pipe:"):
            raise DataError(f"sizes.json beside the shards does not say how many images {name} has")
        else:
            sizes[url] = _count(url, class_names, others)
    if others and show:
        kinds = ", ".join(f"{count} {ascii(suffix)[1:-1]}" for suffix, count in others.most_common())
        logger.warning(f"passed over {others.total()} labels without an image that Pillow reads: {kinds}")
    return sizes


def _count(path: str, class_names: list[str], others: Counter[str]) -> int:
    """Return the number of samples that `read_shard` finds, and check their labels; images are not read.

    What stands beside a label in place of an image is counted in `others`, by its suffix.
    """
    count = 0
    try:
        with tarfile.open(path) as tar:
            members = (file for file in tar if file.isreg() and not SPECIAL.match(file.name))
            files = [(*split_name(member.name), member) for member in members]
            for key, group in groupby((file for file in files if file[1]), key=lambda file: file[0]):
                sample: dict[str, Any] = {"__url__": path, "__key__": key}
                for _, suffix, member in group:
                    if suffix.lower() in sample:
                        raise DataError(f"{path} has two files {key}.{suffix.lower()}")
                    content = tar.extractfile(member) if suffix.lower() in ("cls", "json") else None
                    sample[suffix.lower()] = content.read() if content else b""
                if any(f".{suffix}" in IMAGE_SUFFIXES for suffix in sample):
                    labelled(sample, class_names)
                    count += 1
                elif "cls" in sample or b'"label"' in sample.get("json", b""):
                    rest = sorted(sample.keys() - {"__url__", "__key__", "cls", "json"})
                    others[f".{rest[0]}" if rest else "without any"] += 1
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot read the shard {path}: {_reason(error)}") from error
    return count


def _belongs(url: str, names: Sequence[str]) -> bool:
    parent, name = os.path.split(url)
    known = [*names, *SPLIT_NAMES["train"], *SPLIT_NAMES["test"]]
    if any(_begins(name, split) for split in known):  # a file's own name counts before its folder's
        return any(_begins(name, split) for split in names)
    return os.path.basename(parent) in names


def _begins(name: str, split: str) -> bool:
    return re.match(rf"{re.escape(split)}(?![a-z])", name) is not None


def _class_names(roots: list[str], source: str) -> list[str]:
    names = _read_first(roots, "classes.json", json.loads)
    if names is None:
        names = _read_first(
            roots, "classes.txt", lambda text: [line for line in text.splitlines() if line.strip()]
        )
    if names is None:
        raise DataError(f"{source} needs class names: classes.txt beside the shards, a name in each line")
    if isinstance(names, dict):
        by_index = names if all(map(str.isdecimal, names)) else {index: name for name, index in names.items()}
        by_index = {int(index): name for index, name in by_index.items()}
        names = [by_index.get(i) for i in range(len(by_index))]  # a gap becomes None, which is refused
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        expected = "a list of names, or an object of names and indices"
        raise DataError(f"classes.json beside {source} must be {expected}")
    return [str(name) for name in names]


def _read_first(folders: Iterable[str], name: str, parse: Callable[[str], Any]) -> Any:
    """Return what the first of the folders' files of that name holds, or None without such a file."""
    for folder in folders:
        try:
            with extra("webdataset").gopen(f"{folder}/{name}" if folder else name) as file:
                content = file.read()
        except OSError:
            continue
        try:
            return parse(content.decode("utf-8-sig"))
        except ValueError as error:
            raise DataError(f"{folder}/{name} is damaged: {_reason(error)}") from error
    return None


def _reason(error: Exception) -> str:
    """Return an error's reason in one line, without the stream and the URL that webdataset adds to it."""
    text = error if isinstance(error, OSError) or not error.args else error.args[0] or type(error).__name__
    return one_line(text).partition(" @ <")[0]
