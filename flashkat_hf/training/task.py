"""The task of a run: what the trainer does not know of images, their targets and how good a model is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from ..data.augmentation import batch_transform, evaluation_transform, training_transform
from ..data.options import Augmentation
from ..data.samples import ImageData, Transform
from ..data.sources import open_data
from .evaluation import Accuracy, Scores
from .optimization import Mixing
from .recipe import Settings

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Task(Protocol):
    """What a run learns of each image: its class, by default, or masks, or boxes.

    A batch is `pixel_values`, `(batch, channels, height, width)`, and `labels`, a tensor of targets: one
    tensor for an image, all of one shape, so that PyTorch's collation, pinned memory, gradient accumulation
    and CUDA graphs serve each task alike. The model takes both by name and returns an object with a `loss`;
    with `pixel_values` alone, in evaluation mode, whatever `scores` reads.

    Attributes:
        names: of the scores, in [0, 1], that lines of metrics have, with the words for them; the first one
            says which epoch's model is the best.
        unused: names of the settings that mean nothing for the task, and which are refused.
    """

    names: Mapping[str, str]
    unused: Sequence[str]

    def open_data(self, settings: Settings, rank: int, world_size: int) -> ImageData:
        """Return the data of a run, checked; a sample's label is whatever the transforms make targets of.

        Raises:
            ValueError: in one line, for data that do not serve.
        """
        ...

    def transforms(
        self, processor: Any, augmentation: Augmentation
    ) -> tuple[Transform, Transform, nn.Module | None]:
        """Return what training and evaluation do to a sample, and what is left to do for a whole batch.

        A transform takes an RGB image; with the attribute `takes_sample` it takes the `Sample`, and returns
        both `pixel_values` and `labels`. Training's draws from the global generators, which are seeded for
        each image.
        """
        ...

    def mixing(self, settings: Settings, num_labels: int) -> Mix:
        """Return what is done to images and targets on the device, before the model sees them."""
        ...

    def scores(self, accelerator: Accelerator) -> Scores:
        """Return what adds up how good a model is, for one evaluation."""
        ...


class ImageClassification:
    """The class of a whole image; the task of `flashkat finetune` and `flashkat pretrain`."""

    names: Mapping[str, str] = {"top1": "test accuracy", "top5": "top-5 accuracy"}
    unused: Sequence[str] = ()

    def open_data(self, settings: Settings, rank: int, world_size: int) -> ImageData:
        return open_data(settings.data, rank=rank, world_size=world_size, **settings.data_options())

    def transforms(
        self, processor: Any, augmentation: Augmentation
    ) -> tuple[Transform, Transform, nn.Module | None]:
        remainder = batch_transform(processor, augmentation)
        return training_transform(processor, augmentation), evaluation_transform(processor), remainder

    def mixing(self, settings: Settings, num_labels: int) -> Mix:
        return Mixing(settings, num_labels)

    def scores(self, accelerator: Accelerator) -> Scores:
        return Accuracy(accelerator)


def check_unused(task: Task, settings: Settings) -> None:
    """Refuse settings that mean nothing for a task.

    Raises:
        ValueError: one of them has another value than its default.
    """
    given, plain = (
        settings.to_dict(),
        Settings(data=settings.data, model=settings.model, fit_defaults=settings.fit_defaults).to_dict(),
    )
    for name in task.unused:
        if given[name] != plain[name]:
            raise ValueError(f"--{name}: {given[name]} means nothing for {type(task).__name__}")


def as_they_are(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return images and targets unchanged: the mixing of tasks that have none."""
    return images, targets
