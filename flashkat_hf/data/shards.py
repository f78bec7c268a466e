"""WebDataset shards: tar files of images and labels, read from one end to the other (extra `train`).

A sample is an image and its label: `name.jpg` and `name.cls`, or `name.json` with the field "label". The
order of an epoch is the shards in random order, one after the other, cut into equal parts; each worker reads
its part through a shuffle buffer. So all images are shared out fairly whatever the number of shards, and a
worker reads at most one shard more than it has images for.
"""

import hashlib
import json
import os
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy

from ..messages import extra
from .samples import IMAGE_SUFFIXES, DataError, ImageData, Sample, Share, check_classes

SPLITS = {"train": ("train", "training"), "test": ("val", "valid", "validation", "test")}
META = re.compile(r"__[^/]*__($|/)")  # webdataset passes over such names


@dataclass(frozen=True)
class Shards:
    """A split in tar files; a `Stream`.

    Attributes:
        urls: of the tar files, in order: paths, or what webdataset's `gopen` opens.
        sizes: number of images in each.
        class_names: in the order of the labels.
        skip_corrupt: as in `Examples`.
        buffer: images, not decoded, among which the shuffle draws.
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

    def samples(self, shuffle: tuple[int, int] | None, share: Share) -> Iterator[Sample]:
        order = list(range(len(self.urls)))
        if shuffle is None:
            yield from self._read(order, *share.bounds(self.num_images))
            return
        random.Random(_word(*shuffle)).shuffle(order)
        samples = self._read(order, *share.bounds(self.num_images))
        generator = random.Random(_word(*shuffle, share.rank * share.workers + share.worker))
        yield from extra("webdataset").shuffle(self.buffer, initial=self.buffer, rng=generator)(samples)

    def _read(self, order: list[int], first: int, last: int) -> Iterator[Sample]:
        """Positions `[first, last)` of the shards in this order."""
        start = 0
        for shard in order:
            size = self.sizes[shard]
            low, high = max(first - start, 0), min(last - start, size)
            start += size
            if low < high:
                found = 0
                for sample in islice(read_shard(self.urls[shard]), low, high):
                    found += 1
                    yield labelled(sample, self.class_names)
                if found < high - low:
                    raise DataError(
                        f"{self.urls[shard]} has fewer images than the {size} that it should have"
                    )


def labelled(sample: dict[str, Any], class_names: Sequence[str]) -> Sample:
    """The image of a sample, with the index of its class.

    Raises:
        DataError: it has no label, or none of these classes.
    """
    image = next(key for key in sample if f".{key}" in IMAGE_SUFFIXES)
    name = f"{sample['__url__']}/{sample['__key__']}.{image}"
    try:
        label = sample["cls"].decode().strip() if "cls" in sample else json.loads(sample["json"])["label"]
        index = int(label) if str(label).isdecimal() else list(class_names).index(label)
    except (KeyError, TypeError, ValueError) as error:
        what = (
            "its label is none of the class names" if "cls" in sample or "json" in sample else "it has none"
        )
        raise DataError(
            f"no label for {name}: {what}, .cls or .json with the field label is expected"
        ) from error
    if index >= len(class_names):
        raise DataError(f"label {index} of {name} is not one of the {len(class_names)} classes")
    return Sample(sample[image], index, name)


def is_shards(source: str) -> bool:
    """Whether this is a pattern of tar files, or a folder with some, also in `train/` and `val/`."""
    path = Path(source)
    if path.is_dir():
        return any(path.glob("*.tar")) or any(path.glob("train/*.tar"))
    return source.endswith((".tar", ".tar}")) or ".tar::" in source


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
    """The splits of a folder of shards, or of a brace pattern such as `data/{train-{000..146},val-{00..06}}.tar`.

    Shards belong to the split that their name begins with, or else that their folder is called. Class names
    come from `classes.json` (a list, or names by index, or indices by name) or `classes.txt` (one in each
    line) beside the shards. The numbers of images come from `sizes.json` beside them (by file name), else
    from the tar files, whose labels are checked then.

    Args:
        source: folder or pattern.
        class_names: in place of a file.
        train_split: what the names of training shards begin with; default: train.
        test_split: the same for the test split; default: val, validation or test.
        skip_corrupt: of the splits.
        buffer: size of the shuffle buffer.
        show: a progress bar, where counting takes long.

    Raises:
        DataError: there are no shards of a split, no class names, or no images; a shard is missing or no tar
            file, or, of those that are counted, has an image without a label of the classes.
    """
    path = Path(source)
    folder = path.is_dir()
    urls = (
        sorted(map(str, path.rglob("*.tar")))
        if folder
        else extra("webdataset.shardlists").expand_urls(source)
    )
    names = {"train": (train_split,) if train_split else SPLITS["train"]}
    names["test"] = (test_split,) if test_split else SPLITS["test"]
    split_urls = {split: [url for url in urls if _belongs(url, names[split])] for split in names}
    for split, found in split_urls.items():
        if not found:
            raise DataError(
                f"{source} has no {split} shards: names that begin with {' or '.join(names[split])}"
            )
    roots = [str(path)] if folder else []
    roots += list(dict.fromkeys(os.path.dirname(url) for url in urls))
    classes = check_classes(class_names or _class_names(roots, source), source)
    known = _beside(roots, "sizes.json", json.loads) or {}
    sizes = _sizes([url for found in split_urls.values() for url in found], known, classes, show)
    splits = [
        Shards(found, [sizes[url] for url in found], classes, skip_corrupt, buffer)
        for found in split_urls.values()
    ]
    for split, found in zip(split_urls, splits, strict=True):
        if not found.num_images:
            raise DataError(f"the {split} shards of {source} have no images ({', '.join(IMAGE_SUFFIXES)})")
    about = repr([classes, [(os.path.basename(url), size) for url, size in sizes.items()], _bytes(sizes)])
    return ImageData(splits[0], splits[1], classes, hashlib.sha256(about.encode()).hexdigest())


def read_shard(url: str) -> Iterator[dict[str, Any]]:
    """The samples of a tar file that have an image, as webdataset has them: bytes by suffix.

    Raises:
        DataError: the file is missing or damaged.
    """
    wds, tar = extra("webdataset"), extra("webdataset.tariterators")
    try:
        with wds.gopen(url) as stream:
            files = tar.tar_file_expander([{"url": url, "stream": stream}])
            for sample in tar.group_by_keys(files):
                if any(f".{key}" in IMAGE_SUFFIXES for key in sample):
                    yield sample
    except (OSError, ValueError, tarfile.TarError) as error:
        raise DataError(f"cannot read the shard {url}: {_reason(error)}") from error


def _sizes(urls: list[str], known: dict[str, int], class_names: list[str], show: bool) -> dict[str, int]:
    sizes = {}
    bar = extra("tqdm").tqdm(urls, desc="counting images", unit="shard", delay=2, disable=not show)
    for url in bar:
        name = os.path.basename(url)
        if name in known:
            sizes[url] = int(known[name])
        elif "://" in url or url.startswith("pipe:"):
            raise DataError(f"sizes.json beside the shards does not say how many images {name} has")
        else:
            sizes[url] = _count(url, class_names)
    return sizes


def _count(path: str, class_names: list[str]) -> int:
    """Number of samples with an image, as `read_shard` finds them, whose labels are checked.

    Images are not read.
    """
    split, count = extra("webdataset.tariterators").base_plus_ext, 0
    try:
        with tarfile.open(path) as tar:
            members = [(*split(one.name), one) for one in tar if one.isreg() and not META.match(one.name)]
            for key, group in groupby((one for one in members if one[0]), key=lambda one: one[0]):
                sample: dict[str, Any] = {"__url__": path, "__key__": key}
                for _, suffix, member in group:
                    suffix = suffix.lower()
                    sample[suffix] = tar.extractfile(member).read() if suffix in ("cls", "json") else b""  # pyright: ignore[reportOptionalMemberAccess]
                if any(f".{suffix}" in IMAGE_SUFFIXES for suffix in sample):
                    labelled(sample, class_names)
                    count += 1
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot read the shard {path}: {_reason(error)}") from error
    return count


def _belongs(url: str, names: Sequence[str]) -> bool:
    parent, name = os.path.split(url)
    known = [*names, *SPLITS["train"], *SPLITS["test"]]
    if any(_begins(name, split) for split in known):  # what a file is called counts before its folder
        return any(_begins(name, split) for split in names)
    return os.path.basename(parent) in names


def _begins(name: str, split: str) -> bool:
    return re.match(rf"{re.escape(split)}(?![a-z])", name) is not None


def _class_names(roots: list[str], source: str) -> list[str]:
    if (names := _beside(roots, "classes.json", json.loads)) is None:
        names = _beside(
            roots, "classes.txt", lambda text: [line for line in text.splitlines() if line.strip()]
        )
    if names is None:
        raise DataError(f"{source} needs class names: classes.txt beside the shards, a name in each line")
    if isinstance(names, dict):
        by_index = {
            int(i): name for i, name in (names.items() if all(map(str.isdecimal, names)) else _turned(names))
        }
        names = [by_index.get(i) for i in range(len(by_index))]  # a gap becomes None, which is refused
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"classes.json beside {source} must be a list of names, or an object of names and indices"
        )
    return [str(name) for name in names]


def _turned(names: dict) -> list[tuple]:
    return [(index, name) for name, index in names.items()]


def _beside(roots: list[str], name: str, parse: Callable[[str], Any]) -> Any:
    """What the first file of that name holds, or None."""
    for root in roots:
        try:
            with extra("webdataset").gopen(f"{root}/{name}" if root else name) as file:
                text = file.read().decode()
        except OSError:
            continue
        try:
            return parse(text)
        except ValueError as error:
            raise DataError(f"{root}/{name} is damaged: {_reason(error)}") from error
    return None


def _bytes(urls) -> list[int]:
    return [os.path.getsize(url) for url in urls if os.path.exists(url)]


def _reason(error: Exception) -> str:
    """The first line's worth; webdataset adds the stream and the URL to an error's arguments."""
    text = str(error.args[0] if error.args and not isinstance(error, OSError) else error).partition(" @ <")[0]
    return getattr(error, "strerror", None) or " ".join(text.split()) or type(error).__name__


def _word(*numbers: int) -> int:
    return int(numpy.random.SeedSequence(numbers).generate_state(1, numpy.uint64)[0])
