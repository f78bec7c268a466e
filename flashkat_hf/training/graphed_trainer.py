"""transformers' Trainer with its forward and backward pass replayed as CUDA graphs."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from ..graphs import GraphedStep
from ..messages import warn


class GraphedTrainer(Trainer):
    """transformers' `Trainer`, to be used in its place, that replays forward and backward passes on one GPU.

    All else is the stock trainer's: accumulation, clipping, the optimiser, evaluation, checkpoints. The bits
    are the same, too. Batches of another shape than the first one, such as the last of an epoch, are
    launched, and so is all that a graph does not serve: several processes, float16 with its scaler, a CPU.
    """

    graphed: GraphedStep | None = None
    refused: bool = False

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute the gradients of a batch; return its loss."""
        alone = self.args.world_size == 1 and self.args.n_gpu == 1 and self.accelerator.scaler is None
        if self.refused or not alone or self.args.device.type != "cuda":
            return super().training_step(model, inputs, num_items_in_batch)
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
        return self.graphed(**batch)

    def _step(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "accumulation_steps"}
        return super().training_step(model, inputs, inputs.pop("num_items_in_batch"))
