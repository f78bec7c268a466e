"""transformers' Trainer with its forward and backward pass replayed as CUDA graphs."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from accelerate.utils import recursively_apply
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
    While the GPU replays a pass, the next batch is read and copied to it.
    """

    graphed: GraphedStep | None = None
    refused: bool = False
    ahead: "Ahead | None" = None  # the batches of the epoch
    counted: tuple[list, int] = ([], 0)  # shapes of a batch, and the operations that it takes

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Return the batches of an update, and the number of their items."""
        if device.type == "cuda":
            if self.ahead is None or self.ahead.batches is not epoch_iterator:
                self.ahead = Ahead(epoch_iterator, device)
            epoch_iterator = self.ahead
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute the gradients of a batch; return its loss."""
        alone = self.args.world_size == 1 and self.args.n_gpu == 1 and self.accelerator.scaler is None
        if self.refused or not alone or self.args.device.type != "cuda":
            return super().training_step(model, inputs, num_items_in_batch)
        if not model.training:  # a graph sees by itself whether a part of the model has left this mode
            model.train()
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
        loss = self.graphed(**batch)
        if self.ahead is not None:
            self.ahead.fetch()
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the stock trainer's estimate, for which the parameters are counted once for each shape."""
        shapes = [getattr(value, "shape", None) for value in inputs.values()]
        if self.counted[0] != shapes:
            self.counted = shapes, super().floating_point_ops(inputs)
        return self.counted[1]

    def _step(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "accumulation_steps"}
        return super().training_step(model, inputs, inputs.pop("num_items_in_batch"))


class Ahead:
    """Batches on a GPU, of which `fetch` makes the next one while the GPU is busy with another."""

    def __init__(self, batches: Iterator, device: torch.device):
        self.batches = batches
        self.stream = batch_stream(device)  # the copies to the GPU do not wait for the replay
        self.fetched: deque[Future] = deque()

    def fetch(self) -> None:
        """Make the next batch; an error in it, or the end of the batches, is raised when it is asked for."""
        made: Future = Future()
        with torch.cuda.stream(self.stream):
            try:
                made.set_result(next(self.batches))
            except Exception as error:
                made.set_exception(error)
        self.fetched.append(made)

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if not self.fetched:
            return next(self.batches)
        batch = self.fetched.popleft().result()
        stream = torch.cuda.current_stream(self.stream.device)
        stream.wait_stream(self.stream)
        return recursively_apply(partial(_used_on, stream), batch)


def _used_on(stream: torch.cuda.Stream, tensor: Tensor) -> Tensor:
    """Return a tensor whose memory is not given to another one before the stream is done with it."""
    if tensor.is_cuda:
        tensor.record_stream(stream)
    return tensor
