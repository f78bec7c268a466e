"""Training batches of small images that are read once and then lie on the device, decoded."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..messages import extra
from .batches import Batch, EpochOrder, checked, count_batches
from .gpu.shifting import Shifting
from .samples import Examples, Transform
from .workers import Indexed, collate, make_loader

READ_AT_ONCE = 256  # images


class HeldBatches:
    """The training batches of one process, in the order of `TrainBatches`, which has the same methods.

    Attributes:
        corrupt: as in `TrainBatches`.
    """

    def __init__(
        self,
        split: Examples,
        transform: Transform,
        shifting: Shifting,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Prepare to read; nothing is read before `epoch`.

        Args:
            split: `ImageData.train`.
            transform: from an RGB image to the pixels that are held, `(channels, *held_size)` uint8.
            shifting: makes the batches, on its device.
            batch_size: images of one process and micro-batch.
            seed: seed of order and augmentation; the same in every process.
            workers: number of processes that read; 0: this one does.
            rank: index of this process.
            world_size: number of processes.

        Raises:
            DataError: the split has fewer images than one batch of all processes.
        """
        self.split, self.transform, self.shifting = split, transform, shifting
        self.seed, self.workers, self.rank = seed, workers, rank
        self.num_batches = count_batches(split, batch_size, world_size)
        self.order = EpochOrder(len(split), batch_size, seed, rank, world_size, 0)
        self.corrupt: dict[str, str] = {}
        self.held: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return self.num_batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from number `start` on.

        Returns:
            `{"pixel_values": (batch, channels, height, width) float32, "labels": (batch,) int64}` on the
            device.

        Raises:
            DataError: an image cannot be read, and the split does not skip such.
        """
        self.read()
        assert self.held is not None
        images, labels = self.held
        draws = self.shifting.draws(self.seed, epoch, len(labels))
        for first, indices in self.order.batches(epoch, start):
            pixels = self.shifting(images, indices, draws[first : first + len(indices)])
            yield {"pixel_values": pixels, "labels": labels[indices].to(images.device, non_blocking=True)}

    def close(self) -> None:
        """Do nothing: the worker processes have ended when all images are read."""

    def read(self, stop: Callable[[], int] = lambda: 0) -> None:
        """Read all images, unless they are held or `stop` ends it early: then nothing is held.

        What is held is `(images, *held_size, channels)` uint8 on the device, and the labels on the CPU.

        Raises:
            DataError: as `epoch`.
        """
        if self.held is not None:
            return
        count, device = len(self.split), self.shifting.mean.device
        numbers = torch.arange(count).split(READ_AT_ONCE)
        keys = [[(0, number, number) for number in part.tolist()] for part in numbers]
        dataset = Indexed(self.split, self.transform, self.seed)
        loader = make_loader(
            dataset, min(self.workers, len(keys)), persistent=False, batch_sampler=keys, collate_fn=collate
        )
        images, labels = None, torch.empty(count, dtype=torch.int64)
        options = {"desc": "reading images", "unit": "image", "delay": 2, "disable": self.rank > 0}
        with extra("tqdm").tqdm(total=count, **options) as bar:
            for part, batch in zip(numbers, checked(loader, self.corrupt), strict=True):
                if stop():
                    return
                pixels = batch["pixel_values"].permute(0, 2, 3, 1)
                if images is None:
                    images = torch.empty(count, *pixels.shape[1:], dtype=torch.uint8, device=device)
                images[part[0] : part[-1] + 1] = pixels.to(device)
                labels[part] = batch["labels"]
                bar.update(len(part))
        assert images is not None
        self.held = images, labels
