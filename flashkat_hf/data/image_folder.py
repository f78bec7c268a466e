"""Image folders: `train/`, `val/` and perhaps `test/`, with a sub-folder for each class."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

from transformers.utils import logging

from ..messages import extra, one_line
from .samples import (
    IMAGE_SUFFIXES,
    DataError,
    Examples,
    ImageData,
    Paths,
    and_more,
    check_classes,
    check_labels,
    check_name,
    header,
    normalised,
    unreadable,
)

logger = logging.get_logger(__name__)
FINGERPRINT_BYTES = 2**28  # up to so many the fingerprint reads the files, beyond it their names and sizes
VAL_FOLDERS = ("val", "validation", "valid")  # the first of them that exists


class Found(NamedTuple):
    """An image below the folder of a class.

    Attributes:
        path: its path.
        real: its path without links.
        link: whether the file itself is a link.
    """

    path: str
    real: str
    link: bool


class Placed(NamedTuple):
    """The images of a class in a split."""

    split: str
    label: int
    name: str
    images: list[Found]


@dataclass
class Walk:
    """A walk through the folders of the classes, which notes what it passes over.

    Attributes:
        linked: whether there are links.
        others: number of files that are no images, by their suffix.
        looping: links to a folder that holds them.
        dangling: links that lead nowhere and are not named as images are.
    """

    linked: bool = False
    others: Counter[str] = field(default_factory=Counter)
    looping: list[str] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)

    def images(self, folder: str, above: tuple[str, ...]) -> Iterator[Found]:
        """Yield the images below a folder; `above` has the real paths of the folders that lead to it."""
        real = os.path.join(above[-1], os.path.basename(folder))
        if os.path.islink(folder):
            real, self.linked = os.path.realpath(folder), True
            if any(os.path.commonpath([real, path]) == real for path in above):
                self.looping.append(folder)
                return
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise DataError(f"cannot read the folder {folder}: {one_line(error)}") from error
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            if is_folder or suffix in IMAGE_SUFFIXES:
                check_name(entry.name, f"a file or folder in {folder}")
            if is_folder:
                yield from self.images(entry.path, (*above, real))
            elif suffix in IMAGE_SUFFIXES and _is_special(entry):
                self.others["special files"] += 1
            elif suffix in IMAGE_SUFFIXES:
                link = entry.is_symlink()
                self.linked |= link
                target = os.path.realpath(entry.path) if link else os.path.join(real, entry.name)
                yield Found(entry.path, target, link)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                self.dangling.append(entry.path)
            else:
                self.others[ascii(suffix)[1:-1] or "no suffix"] += 1

    def report(self, root: Path) -> None:
        """Say in warnings what was passed over in the image folder `root`."""
        links = [("lead to a folder that holds them", self.looping), ("lead nowhere", self.dangling)]
        for what, paths in links:
            if paths:
                logger.warning(f"passed over {len(paths)} links that {what}: {paths[0]}{and_more(paths)}")
        if self.others:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in self.others.most_common())
            logger.warning(f"passed over {self.others.total()} files in {root} that are no images: {kinds}")


def _is_special(entry: os.DirEntry) -> bool:
    """Return whether an entry is a pipe, a socket or a device, which reading would wait for."""
    if entry.is_symlink():
        return os.path.exists(entry.path) and not os.path.isfile(entry.path)
    return not entry.is_file()


def load_image_folder(
    root: str | os.PathLike, rank: int = 0, world_size: int = 1, skip_corrupt: bool = False
) -> ImageData[Examples]:
    """Read `root/train/<class>/*` and the same of `val/` and `test/`; check the header of every image.

    `validation/` and `valid/` are other names of `val/`. One of `val/` and `test/` is enough: it is the test
    split. With both, an epoch is chosen on `val/`. A `test/` beside `val/` that has none of the classes, as
    that of images without labels, is passed over. Images may stand in sub-folders of a class's folder.
    Names that start with a dot are passed over, and with a warning files whose suffix Pillow
    does not read, and links to a folder that holds them. Other links are followed.

    Args:
        root: the folder.
        rank: index of this process; processes that load one folder share the checks.
        world_size: number of such processes.
        skip_corrupt: do not check; the splits pass over images that cannot be read.

    Raises:
        DataError: a folder is missing or has no images, there are fewer than two classes, the splits have
            different classes, a link gives an image a second class or split, a link leads nowhere, or a file
            is no image; the message names it.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    val = next((name for name in VAL_FOLDERS if (root / name).is_dir()), None)
    names = ["train", *([val] if val else []), *(["test"] if (root / "test").is_dir() else [])]
    folders = {
        split: _class_folders(root, split) for split in (names if len(names) > 1 else ["train", "val"])
    }
    class_names = check_classes(sorted(folders["train"]), str(root / "train"))
    if len(folders) == 3 and not folders["test"].keys() & folders["train"].keys():
        del folders["test"]
    for other in list(folders)[1:]:
        for split, reference in (("train", other), (other, "train")):
            if only := sorted(folders[split].keys() - folders[reference].keys()):
                both = f"{root / split} has classes that {root / reference} has not"
                raise DataError(f"{both}: {', '.join(only)}")
    walk = Walk(linked=any((root / split).is_symlink() for split in folders))
    found = [
        Placed(split, label, name, _images(folders[split][name], walk))
        for split in folders
        for label, name in enumerate(class_names)
    ]
    if walk.linked:
        _check_links(found)
    if walk.dangling and not skip_corrupt:
        link = walk.dangling[0]
        more = and_more(walk.dangling)
        raise DataError(f"{link} is a link to {os.readlink(link)}, which does not exist{more}")
    if rank == 0:
        walk.report(root)
    parts = {split: [placed for placed in found if placed.split == split] for split in folders}
    splits = [_examples(part, root / name, len(class_names), skip_corrupt) for name, part in parts.items()]
    paths = [str(path) for split in splits for path in split.images]
    if not skip_corrupt:
        _check_headers(paths[rank::world_size], show=rank == 0)
    val_split = splits[1] if len(splits) == 3 else None
    return ImageData(splits[0], splits[-1], class_names, _fingerprint(paths, root), val=val_split)


def is_image_folder(root: Path) -> bool:
    """Return whether a folder has images in the folder of a class, whatever else stands beside them."""
    classes = (path for path in (root / "train").glob("[!.]*") if path.is_dir())
    return any(True for path in classes for _ in Walk().images(str(path), (os.path.realpath(path.parent),)))


def _class_folders(root: Path, split: str) -> dict[str, list[Path]]:
    """Return the folders of each class of a split; two may differ in how Unicode composes their name."""
    if not (root / split).is_dir():
        missing = f"{root} must hold train/ and val/, with a sub-folder for each class; {split}/ is missing"
        raise DataError(missing)
    folders: dict[str, list[Path]] = {}
    for path in sorted((root / split).glob("[!.]*")):
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path} is a link to {os.readlink(path)}, which does not exist")
        if path.is_dir():
            folders.setdefault(normalised(path.name, str(root / split)), []).append(path)
    return folders


def _images(folders: list[Path], walk: Walk) -> list[Found]:
    """Return the images below the folders of a class, in the order of their paths."""
    images = [image for path in folders for image in walk.images(str(path), (os.path.realpath(path.parent),))]
    if not images:
        raise DataError(f"{folders[0]} has no images")
    return sorted(images)


def _check_links(found: list[Placed]) -> None:
    """Raise DataError if links give an image a second class or split.

    Links to files outside of the folders of all classes may repeat: stores of files by their content do that.
    """
    places: dict[str, tuple[Placed, str]] = {}
    for link in (False, True):
        for placed in found:
            for image in placed.images:
                if image.link is not link:
                    continue
                other, path = places.get(image.real, (placed, ""))
                if other is not placed:
                    both = f"{other.split}/{other.name} and {placed.split}/{placed.name}"
                    raise DataError(f"{path} and {image.path} are one file, which would be in {both}")
                if not link:
                    places[image.real] = placed, image.path


def _examples(found: list[Placed], folder: Path, num_classes: int, skip_corrupt: bool) -> Examples:
    paths = [image.path for placed in found for image in placed.images]
    labels = [placed.label for placed in found for _ in placed.images]
    return Examples(Paths(paths), check_labels(labels, num_classes, str(folder)), skip_corrupt)


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
    files = [(path, os.path.getsize(path) if os.path.exists(path) else -1) for path in paths]
    names = [(os.path.relpath(path, root), size) for path, size in files]
    digest = hashlib.sha256(repr(names).encode("utf-8", "surrogateescape"))
    if sum(size for _, size in files) <= FINGERPRINT_BYTES:
        for path, size in files:
            digest.update(Path(path).read_bytes() if size > 0 else b"")
    return digest.hexdigest()
