"""The boxes that detect.py trains on: files in COCO's format, checked, or digits on photographs."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from two_backbones import photograph_pieces

from flashkat_hf.data.samples import DataError, Examples, ImageData, check_classes
from flashkat_hf.files import read_json
from flashkat_hf.messages import one_line

INK = 0.25  # of a digit's pixels: what belongs to its box
CONTRAST = 70  # least mean difference of a digit's colour from what is behind it, of 255


def read_folder(folder: Path) -> ImageData:
    """Return the images of a folder and their boxes.

    Returns:
        A sample's label is `(boxes, 5)` float32: left, top, right, bottom in pixels of the image, and the
        number of the class, in the order of the categories' ids. All images have equally many rows; those
        that are no boxes are -1.

    Raises:
        DataError: in one line: a file or an image is missing, no JSON or not in COCO's form; a box is outside
            its image, has no area or is of an unknown category; or the two files name other categories.
    """
    files = {split: _read(folder / f"{split}.json") for split in ("train", "val")}
    categories = {split: _categories(folder / f"{split}.json", file) for split, file in files.items()}
    if categories["train"] != categories["val"]:
        raise DataError(f"--data: {folder}/train.json and val.json name other categories")
    numbers = {key: number for number, key in enumerate(categories["train"])}
    digest, parts = hashlib.sha256(), {}
    for split, file in files.items():
        parts[split] = _split(folder / split, folder / f"{split}.json", file, numbers)
        digest.update((folder / f"{split}.json").read_bytes())
    most = max(len(rows) for images in parts.values() for rows in images.values())
    splits = [
        Examples(list(images), [_padded(rows, most) for rows in images.values()]) for images in parts.values()
    ]
    return ImageData(
        *splits, check_classes(list(categories["train"].values()), str(folder)), digest.hexdigest()
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"--data: {path} is missing")
    try:
        content = read_json(path)
    except ValueError as error:
        raise DataError(f"--data: {one_line(error)}") from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(content.get(name), list) or not all(isinstance(row, dict) for row in content[name]):
            raise DataError(f"--data: {path} has no list {name!r}, as COCO's form has it")
    return content


def _categories(path: Path, file: dict[str, Any]) -> dict[int, str]:
    """Return the names of the categories by their ids, in the order of these."""
    rows = file["categories"]
    if not all(isinstance(row.get("id"), int) and isinstance(row.get("name"), str) for row in rows):
        raise DataError(f"--data: {path} has a category without an id or a name")
    return {row["id"]: row["name"] for row in sorted(rows, key=lambda row: row["id"])}


def _split(folder: Path, path: Path, file: dict[str, Any], numbers: dict[int, int]) -> dict[str, list]:
    """Return the rows of each image, by its path."""
    images, sizes = {}, {}
    for row in file["images"]:
        name = row.get("file_name")
        image = folder / str(name)
        if not image.is_file():
            raise DataError(f"--data: {path} names the image {name}, but {image} is missing")
        try:
            with Image.open(image) as opened:
                size = opened.size
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"--data: cannot read the image {image}: {one_line(error)}") from error
        if (told := (row.get("width", size[0]), row.get("height", size[1]))) != size:
            told = "{}x{} pixels, but it has {}x{}".format(*told, *size)
            raise DataError(f"--data: {path} says that {name} has {told}")
        images[row.get("id")], sizes[row.get("id")] = (str(image), []), size
    if not images:
        raise DataError(f"--data: {path} names no images")
    for annotation in file["annotations"]:
        number = annotation.get("id")
        if (key := annotation.get("image_id")) not in images:
            raise DataError(f"--data: {path}: annotation {number} is of image {key}, which is not listed")
        if (category := annotation.get("category_id")) not in numbers:
            raise DataError(f"--data: {path}: annotation {number} has the unknown category {category}")
        box = _box(annotation.get("bbox"), sizes[key], f"--data: {path}: annotation {number}")
        if not annotation.get("iscrowd"):
            images[key][1].append((*box, numbers[category]))
    return dict(images.values())


def _box(box: Any, size: tuple[int, int], where: str) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a box (left, top, width, height) that fits its image."""
    numbers = isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box)
    if not numbers or not all(map(math.isfinite, box)):
        raise DataError(f"{where} has the box {json.dumps(box)}, not [left, top, width, height]")
    left, top, width, height = box
    if width <= 0 or height <= 0:
        raise DataError(f"{where} has the box {box} without an area")
    right, bottom = left + width, top + height
    if left < 0 or top < 0 or right > size[0] + 1 or bottom > size[1] + 1:  # COCO's own round to a pixel
        raise DataError(f"{where} has the box {box} outside its image of {size[0]}x{size[1]} pixels")
    return left, top, min(right, size[0]), min(bottom, size[1])


def _padded(rows: list, most: int) -> numpy.ndarray:
    """Return the rows as an array of `most`, at least one, those that are missing all -1."""
    padded = numpy.full((max(most, 1), 5), -1, dtype=numpy.float32)
    padded[: len(rows)] = rows if rows else padded[:0]
    return padded


def make_scenes(number: int, seed: int, size: int) -> ImageData:
    """Return made-up scenes that train and that validate (see the top of detect.py)."""
    digits, splits, digest = load_digits(), [], hashlib.sha256()
    held_out = numpy.arange(len(digits.target)) % 5 == 0
    for split, count in enumerate((number, max(number // 4, 1))):
        random, piece = numpy.random.default_rng([seed, split]), photograph_pieces(split, size)
        own = numpy.flatnonzero(held_out if split else ~held_out)
        drawings = [(digits.images[index] / 16, int(digits.target[index])) for index in own]
        scenes = [_scene(random, piece(random), drawings) for _ in range(count)]
        digest.update(b"".join(image.tobytes() for image, _ in scenes))
        images = [Image.fromarray(image) for image, _ in scenes]
        splits.append(Examples(images, [_padded(rows, 4) for _, rows in scenes]))
    names = [str(name) for name in digits.target_names]
    return ImageData(*splits, names, digest.hexdigest(), "made-up scenes")


def _scene(
    random: numpy.random.Generator, scene: numpy.ndarray, drawings: list
) -> tuple[numpy.ndarray, list]:
    """Return one image `(size, size, 3)`, bytes, and the rows of its one to four digits."""
    rows: list[tuple[int, int, int, int, int]] = []
    for _ in range(random.integers(1, 5)):
        drawing, label = drawings[random.integers(len(drawings))]
        side = int(random.integers(14, 27))
        ink = Image.fromarray((drawing * 255).astype("uint8")).resize((side, side), Image.Resampling.BICUBIC)
        ink = numpy.asarray(ink) / 255
        lines, columns = (numpy.flatnonzero((ink > INK).any(axis)) for axis in (1, 0))
        ink = ink[lines[0] : lines[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = ink.shape
        top, left = (int(random.integers(len(scene) - edge + 1)) for edge in (height, width))
        right, bottom = left + width, top + height
        if any(left < row[2] and row[0] < right and top < row[3] and row[1] < bottom for row in rows):
            continue  # digits do not cover each other
        behind, colour = scene[top:bottom, left:right], random.integers(0, 256, 3)
        mean = behind.mean((0, 1))
        if abs(colour - mean).mean() < CONTRAST:
            colour = 255.0 * (mean < 128)
        scene[top:bottom, left:right] = behind + ink[..., None] * (colour - behind)
        rows.append((left, top, right, bottom, label))
    return scene.round().astype("uint8"), rows
