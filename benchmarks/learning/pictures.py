"""The pictures of the bench: Fashion-MNIST and scikit-learn's digits, and their augmentation on a device."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from flashkat_hf.messages import extra

from . import fashion_mnist

HELD_OUT = 0.1  # of the training pictures, where a learning rate is chosen
SPLIT = {"test_size": 0.2, "random_state": 0}  # of the digits, as `flashkat_hf.data` splits them


@dataclass(frozen=True)
class Pictures:
    """Grey pictures with their labels, and how a model takes them.

    Attributes:
        name: of the data set.
        train: `(count, height, width)` uint8; `test` likewise.
        train_labels: `(count,)` int64; `test_labels` likewise.
        patch_size: in pixels.
        shift: training pictures are moved by up to so many pixels in each direction.
        mirrored: whether half of them are mirrored.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    patch_size: int
    shift: int
    mirrored: bool

    @property
    def sizes(self) -> dict[str, Any]:
        """Return the fields of `FlashKATConfig` that follow from the pictures."""
        number = int(self.train_labels.max()) + 1
        sides = {"image_size": self.train.shape[-1], "patch_size": self.patch_size}
        return {**sides, "num_channels": 1, "num_labels": number}

    def to(self, device: str) -> "Pictures":
        names = ("train", "train_labels", "test", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def with_held_out(self) -> "Pictures":
        """Return training pictures without a tenth of each class, which stands in place of the test."""
        selection = extra("sklearn.model_selection")
        train, held = selection.train_test_split(
            numpy.arange(len(self.train)),
            test_size=HELD_OUT,
            random_state=0,
            stratify=self.train_labels.cpu().numpy(),
        )
        return replace(
            self,
            train=self.train[train],
            train_labels=self.train_labels[train],
            test=self.train[held],
            test_labels=self.train_labels[held],
        )

    def first(self, count: int | None) -> "Pictures":
        """Return the set with `count` training pictures, as many of each class as can be."""
        if count is None or count >= len(self.train):
            return self
        selection = extra("sklearn.model_selection")
        chosen, _ = selection.train_test_split(
            numpy.arange(len(self.train)),
            train_size=count,
            random_state=0,
            stratify=self.train_labels.numpy(),
        )
        return replace(self, train=self.train[chosen], train_labels=self.train_labels[chosen])

    def normalised(self, pictures: Tensor) -> Tensor:
        """Return `(count, 1, height, width)` float32 with the training pictures' mean 0 and variance 1."""
        values = self.train[:10_000].float()
        return ((pictures.float() - values.mean()) / values.std()).unsqueeze(1)

    def epoch(self, seed: int, number: int) -> tuple[Tensor, Tensor]:
        """Return the training pictures of an epoch, shuffled, shifted and mirrored, and their labels.

        A function of seed and number alone, so that contenders of one seed see the same.
        """
        device = self.train.device
        generator = torch.Generator(device).manual_seed(1_000_003 * seed + number)
        count, height, width = self.train.shape
        order = torch.randperm(count, generator=generator, device=device)
        padded = torch.nn.functional.pad(self.train, [self.shift] * 4)
        corner = torch.randint(2 * self.shift + 1, (2, count, 1), generator=generator, device=device)
        rows, columns = (
            start + torch.arange(size, device=device)
            for start, size in zip(corner, (height, width), strict=True)
        )
        if self.mirrored:
            mirror = torch.rand(count, 1, generator=generator, device=device) < 0.5
            columns = torch.where(mirror, columns.flip(1), columns)
        moved = padded[order[:, None, None], rows[:, :, None], columns[:, None, :]]
        return self.normalised(moved), self.train_labels[order]


def load(name: str, source: Path | None = None) -> Pictures:
    """Return a data set, "fashion" or "digits", on the CPU.

    Raises:
        ValueError: its files are missing; the message says how to install them.
    """
    if name == "digits":
        return _digits()
    arrays = fashion_mnist.load(source)
    tensors = [torch.from_numpy(numpy.array(array)) for array in arrays]
    return Pictures("fashion", tensors[0], tensors[1].long(), tensors[2], tensors[3].long(), 4, 2, True)


def _digits() -> Pictures:
    datasets, selection = extra("sklearn.datasets"), extra("sklearn.model_selection")
    digits = datasets.load_digits()
    pixels = torch.from_numpy((digits.images * (255 / 16)).round().astype("uint8"))
    labels = torch.from_numpy(digits.target.astype("int64"))
    train, test = selection.train_test_split(range(len(labels)), stratify=digits.target, **SPLIT)
    return Pictures("digits", pixels[train], labels[train], pixels[test], labels[test], 2, 1, False)
