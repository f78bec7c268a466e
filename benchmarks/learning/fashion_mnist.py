"""Make an image folder of Fashion-MNIST: 70,000 grey pictures of clothes, 28 x 28 pixels, ten classes.

    apt-get install dataset-fashion-mnist
    python -m benchmarks.learning.fashion_mnist --output data/fashion                    # all 60,000 to train
    python -m benchmarks.learning.fashion_mnist --output data/fashion4000 --train 4000   # 400 of each class

The data come from Debian's package, or from a folder with the four files that it has (`--source`). The 10,000
test pictures are written whole. Source: Xiao, Rasul and Vollgraf, *Fashion-MNIST*, 2017, arXiv:1708.07747.
"""

import gzip
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy
from PIL import Image
from transformers import HfArgumentParser

from flashkat_hf.files import replacing

PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package has them
FILES = {"train": "train", "test": "t10k"}
CLASSES = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]
UNSIGNED_BYTE = 8  # the data type in the header of an idx file


def load(source: Path | str | None = None) -> tuple[numpy.ndarray, ...]:
    """Return the pictures and labels of Fashion-MNIST.

    Args:
        source: folder of the four idx files, compressed (`.gz`) or not; default: Debian's package.

    Returns:
        Training pictures `(60000, 28, 28)` uint8, their labels `(60000,)` uint8, which index `CLASSES`, and
        the same of the 10,000 test pictures.

    Raises:
        ValueError: in one line, a file is missing, or is not what it has to be.
    """
    folder = PACKAGE if source is None else Path(source)
    arrays = []
    for part in FILES.values():
        pictures = _read_idx(folder, f"{part}-images-idx3-ubyte", 3)
        labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", 1)
        if len(pictures) != len(labels):
            raise ValueError(f"{folder} has {len(pictures)} pictures of {part}, but {len(labels)} labels")
        if len(labels) and labels.max() >= len(CLASSES):
            raise ValueError(f"{folder} has the label {labels.max()}, but only {len(CLASSES)} classes")
        arrays += [pictures, labels]
    return tuple(arrays)


def _read_idx(folder: Path, name: str, dimensions: int) -> numpy.ndarray:
    """Return the array of an idx file of bytes: a header of big-endian numbers, then the values."""
    path = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
    if path is None:
        install = "apt-get install dataset-fashion-mnist, or --source with a folder of its four files"
        raise ValueError(f"{folder / name}.gz is missing; {install}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    header = 4 + 4 * dimensions
    shape = numpy.frombuffer(content[4:header], ">u4") if len(content) >= header else ()
    values = len(content) - header
    if content[:4] != bytes([0, 0, UNSIGNED_BYTE, dimensions]) or values != numpy.prod(shape, dtype=int):
        raise ValueError(f"{path} is no idx file of bytes in {dimensions} dimensions")
    return numpy.frombuffer(content, numpy.uint8, offset=header).reshape([int(size) for size in shape])


def choose(labels: numpy.ndarray, count: int, seed: int = 0) -> numpy.ndarray:
    """Return the sorted indices of `count` pictures, the same number of each class, by a seed.

    Raises:
        ValueError: `count` is no multiple of the number of classes, or a class has too few.
    """
    share, remainder = divmod(count, len(CLASSES))
    fewest = numpy.bincount(labels, minlength=len(CLASSES)).min()
    if remainder or not 0 < share <= fewest:
        limits = f"a multiple of {len(CLASSES)} from {len(CLASSES)} to {fewest * len(CLASSES)}"
        raise ValueError(f"--train: {count} must be {limits}")
    generator = numpy.random.default_rng(seed)
    chosen = [
        generator.permutation(numpy.flatnonzero(labels == label))[:share] for label in range(len(CLASSES))
    ]
    return numpy.sort(numpy.concatenate(chosen))


def write_folder(output: Path, count: int | None = None, seed: int = 0, source: Path | None = None) -> None:
    """Write `output/train/CLASS/*.png` and `output/test/CLASS/*.png`; the folder appears whole or not at all.

    Args:
        output: a folder that is not there yet.
        count: number of training pictures, the same number of each class; default: all 60,000.
        seed: which of them.
        source: as in `load`.

    Raises:
        ValueError: the output is there, or as `load` and `choose`.
    """
    if output.exists():
        raise ValueError(f"--output: {output} is there already")
    train, train_labels, test, test_labels = load(source)
    indices = numpy.arange(len(train_labels)) if count is None else choose(train_labels, count, seed)
    parts = {"train": (train, train_labels, indices), "test": (test, test_labels, numpy.arange(len(test)))}
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as folder:
        for split, (pictures, labels, chosen) in parts.items():
            for name in CLASSES:
                (folder / split / name).mkdir(parents=True)
            paths = [folder / split / CLASSES[labels[index]] / f"{index:05}.png" for index in chosen]
            with ThreadPool() as pool:
                pool.starmap(_write, zip(pictures[chosen], paths, strict=True), chunksize=256)


def _write(picture: numpy.ndarray, path: Path) -> None:
    Image.fromarray(picture).save(path)


@dataclass(frozen=True)
class Arguments:
    output: Path = field(metadata={"help": "the image folder, which must not be there"})
    train: int | None = field(
        default=None, metadata={"help": "training pictures, the same number of each class; default: all"}
    )
    seed: int = field(default=0, metadata={"help": "which of them"})
    source: Path | None = field(
        default=None, metadata={"help": "folder of the four idx files; default: the package's"}
    )


def main(arguments: Arguments) -> None:
    try:
        write_folder(arguments.output, arguments.train, arguments.seed, arguments.source)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(f"{arguments.output}: {arguments.train or 'all'} training pictures and all test pictures")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses())
