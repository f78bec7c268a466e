"""Any pictures in numbered parts, read in worker processes; a picture that cannot be read is a row, too."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, cast

from torch.utils.data import IterableDataset, get_worker_info

from ..data import open_data
from ..data.samples import (
    IMAGE_SUFFIXES,
    DataError,
    Examples,
    Partition,
    Paths,
    Sample,
    Stream,
    Transform,
    open_image,
)
from ..data.workers import collate

PART = 1024  # pictures in a part


@dataclass(frozen=True)
class Pictures:
    """Pictures to ask about.

    Attributes:
        split: of the data, with labels or without.
        class_names: of the labels; None: there are none.
        fingerprint: changes when the pictures change.
        num_parts: into which the pictures are dealt out.
    """

    split: Examples | Stream
    class_names: list[str] | None
    fingerprint: str
    num_parts: int

    def samples(self, part: int) -> Iterator[Sample]:
        """Yield the samples of a part; all parts together have every picture once, in the data's order."""
        if not isinstance(self.split, Examples):
            yield from self.split.samples(None, Partition(part, self.num_parts))
            return
        count = len(self.split)
        for index in range(part * count // self.num_parts, (part + 1) * count // self.num_parts):
            yield self.split[index]


def open_pictures(source: str | None, split: str = "test", part: int = PART, **options: Any) -> Pictures:
    """Open pictures by one name.

    Args:
        source: a folder of pictures, with sub-folders or without; a text file with a path in each line,
            relative ones to its folder; or what training reads (`open_data`), of which one split is taken.
        split: "train" or "test".
        part: pictures in a part, at most; streams of one file have one part.
        **options: of `open_data`.

    Raises:
        DataError: there are no pictures, or as `open_data`.
    """
    path = Path(source or "digits").expanduser()
    given = {name: value for name, value in options.items() if value}
    if path.is_file() and path.suffix == ".txt":
        return of_files(listed(path), part, str(path), given)
    if source and path.is_dir() and not (path / "train").is_dir():
        files = sorted(
            str(file)
            for file in path.rglob("*")
            if file.suffix.lower() in IMAGE_SUFFIXES
            and not any(name.startswith(".") for name in file.relative_to(path).parts)
        )
        if files:
            return of_files(files, part, str(path), given)
    data = open_data(source, skip_corrupt=source not in (None, "digits"), **given)
    chosen = data.train if split == "train" else data.test
    count = chosen.num_images
    if isinstance(chosen, Examples):
        parts = -(-len(chosen) // part)
    else:
        most = chosen.most_workers(1)
        parts = most if count is None else min(most, -(-count // part))
    return Pictures(chosen, data.class_names, f"{data.fingerprint} {split}", max(parts, 1))


def listed(path: Path) -> list[str]:
    """Return the paths in a text file, one a line; empty lines are passed over."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path} names no pictures")
    folder = os.path.dirname(path)  # pathlib takes some microseconds for each of perhaps a million
    return [os.path.join(folder, line) for line in lines]


def of_files(files: Sequence[str], part: int, source: str, options: dict[str, Any]) -> Pictures:
    if options:
        raise DataError(f"{source} holds pictures alone, which take no {', '.join(options)}")
    absolute = cache(lambda folder: os.path.join(os.path.abspath(folder), ""))  # slow, and asked often
    parts = (file.rpartition(os.sep) for file in files)
    paths = (f"{absolute(folder + sep)}{name}" for folder, sep, name in parts)
    digest = hashlib.sha256("\0".join(paths).encode(errors="surrogateescape"))
    examples = Examples(Paths(files), [0] * len(files))
    return Pictures(examples, None, digest.hexdigest(), -(-len(files) // part))


class ReadBatch(dict[str, Any]):
    """A batch that was read: `{"part", "last", "names", "labels", "errors", "inputs"}`.

    `errors` has None for pictures that could be read, and `inputs` has what the transform made of those,
    collated, or is None.
    """

    def pin_memory(self) -> "ReadBatch":
        """Return the batch with its pixels or files in pinned memory.

        A `DataLoader` would look at each name, label and error, too.
        """
        inputs = self["inputs"]
        if inputs is not None:
            inputs = {**inputs, "pixel_values": inputs["pixel_values"].pin_memory()}
        return ReadBatch(self, inputs=inputs)


class Reader(IterableDataset):
    """Batches of some parts, one part after the other in each worker process, each a `ReadBatch`."""

    def __init__(self, pictures: Pictures, parts: Sequence[int], transform: Transform, batch_size: int):
        self.pictures = pictures
        self.parts = parts
        self.transform = transform
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[ReadBatch]:
        info = get_worker_info()
        for part in self.parts[info.id :: info.num_workers] if info else self.parts:
            samples = self.pictures.samples(part)
            batch = list(islice(samples, self.batch_size))
            while True:
                following = list(islice(samples, self.batch_size))
                yield ReadBatch(self.read(batch), part=part, last=not following)
                if not following:
                    break
                batch = following

    def read(self, samples: Sequence[Sample]) -> dict[str, Any]:
        errors: list[str | None] = []
        items = []
        for sample in samples:
            try:
                items.append({**self.item(sample), "corrupt": {}})
                errors.append(None)
            except DataError as error:
                errors.append(str(error))
        return {
            "names": [sample.name for sample in samples],
            "labels": [sample.label for sample in samples],
            "errors": errors,
            "inputs": collate(items) if items else None,
        }

    def item(self, sample: Sample) -> dict[str, Any]:
        """Return what the transform makes of a sample, by name."""
        if getattr(self.transform, "takes_sample", False):
            return cast(Any, self.transform)(sample)
        return {"pixel_values": self.transform(open_image(sample.image, sample.name))}
