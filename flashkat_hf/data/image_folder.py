"""Image folders: `train/` and `val/`, with a sub-folder for each class."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from ..messages import extra
from .samples import (
    IMAGE_SUFFIXES,
    DataError,
    Examples,
    ImageData,
    Paths,
    and_more,
    check_classes,
    check_labels,
    header,
    unreadable,
)

FINGERPRINT_BYTES = 2**28  # up to so many the fingerprint reads the files, beyond it their names and sizes


def load_image_folder(
    root: str | os.PathLike, rank: int = 0, world_size: int = 1, skip_corrupt: bool = False
) -> ImageData[Examples]:
    """Read `root/train/<class>/*` and `root/val/<class>/*`, with the header of every image checked.

    Images may stand in sub-folders of a class's folder. Names that start with a dot are passed over.

    Args:
        root: the folder.
        rank: index of this process; processes that load one folder share the checks.
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
    for split, reference in (("train", "val"), ("val", "train")):
        if only := sorted(set(names[split]) - set(names[reference])):
            raise DataError(f"{root / split} has classes that {root / reference} has not: {', '.join(only)}")
    splits = [_list_images(root / split, class_names, skip_corrupt) for split in ("train", "val")]
    paths = [str(path) for split in splits for path in split.images]
    if not skip_corrupt:
        _check_headers(paths[rank::world_size], show=rank == 0)
    return ImageData(splits[0], splits[1], class_names, _fingerprint(paths, root))


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
    with ThreadPool(16) as pool:  # waits for the disk, not for the processor
        results = pool.imap(_header_error, paths, chunksize=64)
        options = {"desc": "checking images", "unit": "image", "delay": 2, "disable": not show}
        errors = [error for error in extra("tqdm").tqdm(results, total=len(paths), **options) if error]
    if errors:
        raise DataError(errors[0] + and_more(errors))


def _header_error(path: str) -> str | None:
    try:
        with header(path):
            return None
    except Exception as error:
        return str(unreadable(path, None, error))


def _fingerprint(paths: Iterable[str], root: Path) -> str:
    """Return SHA-256 of the files' names and sizes, and of their contents if they are small in all."""
    files = [(os.path.relpath(path, root), os.path.getsize(path)) for path in paths]
    digest = hashlib.sha256(repr(files).encode("utf-8", "surrogateescape"))
    if sum(size for _, size in files) <= FINGERPRINT_BYTES:
        for name, _ in files:
            digest.update(Path(root, name).read_bytes())
    return digest.hexdigest()
