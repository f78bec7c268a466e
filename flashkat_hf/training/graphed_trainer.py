"""transformers' Trainer with its forward and backward pass replayed as CUDA graphs."""

import random
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from ..data.prefetch import batch_stream
from ..graphs import GraphedStep
from ..messages import warn


class GraphedTrainer(Trainer):
    """transformers' `Trainer`, to be used in its place, that replays forward and backward passes on one GPU.

    All else is the stock trainer's: accumulation, clipping, the optimiser, evaluation, checkpoints. The bits
    are the same, too. Batches of another shape than the first one, such as the last of an epoch, are
    launched, and so is all that a graph does not serve: several processes, float16 with its scaler, a CPU.
    While the GPU replays a pass, the next batch is read and copied to it, unless reading draws from this
    process's random generators, as augmentation does without worker processes.
    """

    graphed: GraphedStep | None = None
    refused: bool = False
    ahead: "Ahead | None" = None  # the batches of the epoch
    counted: tuple[Any, int] = (None, 0)  # the model with the shapes of a batch, and the operations it takes

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the stock trainer does; it takes and returns the same."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.ahead = None  # its worker processes end

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Return the batches of an update, and the number of their items."""
        if self.ahead is None or self.ahead.batches is not epoch_iterator:
            self.ahead = Ahead(epoch_iterator, device)
        return super().get_batch_samples(self.ahead, num_batches, device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute the gradients of a batch; return its loss."""
        if self.refused or not self._may_replay():
            return super().training_step(model, inputs, num_items_in_batch)
        if not model.training:  # a graph sees by itself whether a part of the model has left this mode
            model.train()
        if callable(switch := getattr(self.optimizer, "train", None)):
            switch()  # an optimiser that evaluates other weights than it trains
        batch = dict(self._prepare_inputs(inputs))
        batch["num_items_in_batch"] = num_items_in_batch
        batch["accumulation_steps"] = self.current_gradient_accumulation_steps
        if self.graphed is None or self.graphed.module is not model:
            try:
                self.graphed = GraphedStep(model, batch, partial(self._step, model))
            except ValueError as error:
                warn(f"{error}; launching kernels")
                self.refused = True
                return super().training_step(model, inputs, num_items_in_batch)
        before = torch.cuda.current_stream().record_event()
        loss = self.graphed(**batch)
        if self.ahead is not None:
            self.ahead.fetch(before)
        return loss

    def _may_replay(self) -> bool:
        """Tell whether it is one process on one GPU, without a scaler."""
        alone = self.args.world_size == 1 and self.args.n_gpu == 1 and self.accelerator.scaler is None
        return alone and self.args.device.type == "cuda"

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the stock trainer's estimate, for which the parameters are counted once for each shape."""
        counted = self.model, [getattr(value, "shape", None) for value in inputs.values()]
        if self.counted[0] != counted:
            self.counted = counted, super().floating_point_ops(inputs)
        return self.counted[1]

    def _step(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "accumulation_steps"}
        return super().training_step(model, inputs, inputs.pop("num_items_in_batch"))


class Ahead:
    """The batches of an iterator, of which `fetch` makes the next one while the GPU is busy with another.

    Nobody can tell by a batch, or by the random numbers, that it was made ahead of its time.
    """

    def __init__(self, batches: Iterator, device: torch.device):
        self.batches = batches
        self.device = device
        self.fetched: Future | None = None
        self.begun = False
        self.draws = True  # from the generators of this process, as far as is known

    def fetch(self, before: torch.Event) -> None:
        """Make the next batch, unless that draws; an error in it is raised when the batch is asked for.

        Args:
            before: what the GPU has done when it begins to copy the batch, on a stream of its own. All uses
                of earlier batches are among it, so that their memory can be used again.
        """
        if self.draws or self.fetched is not None:
            return
        made: Future = Future()
        generators = _generators()
        stream = batch_stream(self.device)
        stream.wait_event(before)
        with torch.cuda.stream(stream):
            try:
                made.set_result(next(self.batches))
            except StopIteration:
                return
            except Exception as error:
                made.set_exception(error)
        self.fetched = made
        self.draws = _generators() != generators

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self.fetched is not None:
            fetched, self.fetched = self.fetched, None
            torch.cuda.current_stream(self.device).wait_stream(batch_stream(self.device))
            return fetched.result()
        generators = _generators()
        batch = next(self.batches)
        self.draws = not self.begun or _generators() != generators  # the first one draws the order
        self.begun = True
        return batch


def _generators() -> tuple:
    """Return the states of this process's random generators."""
    numbers: Any = np.random.get_state()
    return random.getstate(), numbers[1].tobytes(), numbers[2:], torch.get_rng_state().numpy().tobytes()
