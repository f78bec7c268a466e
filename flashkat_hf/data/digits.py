"""Handwritten digits that scikit-learn ships (extra `train`)."""

import hashlib

from PIL import Image

from ..messages import extra
from .samples import Examples, ImageData


def load_digits() -> ImageData[Examples]:
    """Return the 1,797 scanned digits of 8 x 8 pixels; a fifth of each class is held out, always the same."""
    datasets, selection = extra("sklearn.datasets"), extra("sklearn.model_selection")
    digits = datasets.load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    images = [Image.fromarray(digit).convert("RGB") for digit in pixels]
    labels = [int(label) for label in digits.target]
    train, test = selection.train_test_split(
        range(len(images)), test_size=0.2, stratify=labels, random_state=0
    )
    splits = [Examples([images[i] for i in split], [labels[i] for i in split]) for split in (train, test)]
    content = pixels.tobytes() + digits.target.tobytes() + bytes(str(test), "ascii")
    class_names = [str(name) for name in digits.target_names]
    return ImageData(splits[0], splits[1], class_names, hashlib.sha256(content).hexdigest())
