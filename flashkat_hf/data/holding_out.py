"""Training images that are held out: the best epoch can be chosen without a look at the test images."""

from collections.abc import Sequence
from dataclasses import replace

import numpy

from .samples import Examples, ImageData, Part

FEWEST = 10  # images that an epoch may be chosen on: fewer say next to nothing


def hold_out(data: ImageData, fraction: float, seed: int) -> ImageData:
    """Move a part of the training images to `val`, of each class the same part as nearly as can be.

    A class keeps at least one image to train on.

    Args:
        data: of a source without a third split.
        fraction: of the training images, in [0, 1).
        seed: which of them; the same seed holds out the same ones.

    Returns:
        The same data with `val`; as they were where they are a stream, where `fraction` is 0, and where fewer
        than `FEWEST` images would be held out.
    """
    train = data.train
    if not isinstance(train, Examples) or not fraction:
        return data
    labels = numpy.asarray(train.labels)
    held = _choose(labels, fraction, seed)
    if len(held) < FEWEST:
        return data
    kept = numpy.setdiff1d(numpy.arange(len(labels)), held)
    return replace(data, train=_part(train, kept), val=_part(train, held))


def _choose(labels: numpy.ndarray, fraction: float, seed: int) -> numpy.ndarray:
    """Return the sorted indices of the images that are held out."""
    generator = numpy.random.default_rng(seed)
    classes, counts = numpy.unique(labels, return_counts=True)
    exact = fraction * counts
    shares = numpy.floor(exact).astype(int)
    rounded_up = numpy.lexsort((generator.random(len(classes)), shares - exact))  # largest remainders first
    shares[rounded_up[: round(fraction * len(labels)) - shares.sum()]] += 1
    shares = numpy.minimum(shares, counts - 1)
    held = [
        generator.permutation(numpy.flatnonzero(labels == label))[:share]
        for label, share in zip(classes, shares, strict=True)
    ]
    return numpy.sort(numpy.concatenate(held))


def _part(examples: Examples, indices: Sequence[int] | numpy.ndarray) -> Examples:
    labels = numpy.asarray(examples.labels)[indices]
    return replace(examples, images=Part(examples.images, numpy.asarray(indices)), labels=labels)
