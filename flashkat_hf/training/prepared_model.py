"""The model of a run as accelerate prepares it, with its optimiser and its averaged weights."""

import copy
import math
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from ..graphs import GraphedCall, GraphedStep
from ..messages import warn
from ..model.modeling_flashkat import FlashKATLayer
from .optimization import AveragedWeights, make_optimizer, whole_weights
from .plan import Plan


class PreparedModel:
    """A model on its device, compiled and sharded as planned, with what changes its weights."""

    def __init__(self, plan: Plan, accelerator: Accelerator, model: nn.Module, processor: Any):
        settings, device = plan.settings, accelerator.device
        self.accelerator = accelerator
        self.settings = settings
        self.processor = processor
        dtype = getattr(torch, settings.save_dtype)
        copied = plan.sharded or dtype != torch.float32
        self.result = copy.deepcopy(model).to(device, dtype) if copied else None  # filled by `whole`
        self.average = AveragedWeights(model, settings.ema_decay) if settings.ema_decay else None
        optimizer = make_optimizer(model, settings, device)
        accelerator.gradient_accumulation_steps = plan.accumulate
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            config = cast(Any, accelerator.state.deepspeed_plugin).deepspeed_config
            config["train_micro_batch_size_per_gpu"] = plan.micro_batch
            config["gradient_accumulation_steps"] = plan.accumulate
            config["gradient_clipping"] = settings.clip_norm or 0.0
        if plan.compiled and plan.sharded:  # block by block: the gathering of shards stays outside
            compile_blocks(model, mode=plan.compile_mode)
        if plan.graphed:  # without DDP, whose hooks a graph does not run: `reduce_gradients` does its work
            self.module = accelerator.prepare_model(model, evaluation_mode=True)
            self.optimizer = accelerator.prepare(optimizer)
        else:
            self.module, self.optimizer = accelerator.prepare(model, optimizer)
        for name in (
            "forward",
            "_original_forward",
        ):  # accelerate's mixed precision: evaluation is in float32
            accelerator.unwrap_model(self.module).__dict__.pop(name, None)
        if self.average:
            self.average.prepare(accelerator)
        self.forward = self.module  # of the training pass
        if plan.compiled and not plan.sharded:
            self.forward = torch.compile(self.module, dynamic=False, mode=plan.compile_mode)
        self.graphed = plan.graphed
        self.reduces = plan.graphed and plan.num_processes > 1
        self.step: GraphedStep | None = None  # captured with the first batch
        # changes the weights by the gradients, and the averaged ones by the weights
        self.update = GraphedCall(self._change_weights, self._replays)

    def add_gradients(self, images: Tensor, targets: Tensor) -> Tensor:
        """Add the gradients of a micro-batch; return its loss, a scalar on the device.

        Args:
            images: `(micro_batch, channels, height, width)` on the device.
            targets: class probabilities `(micro_batch, classes)`.
        """
        batch = {"pixel_values": images, "labels": targets}
        if self.graphed and self.step is None:
            try:
                self.step = GraphedStep(self.accelerator.unwrap_model(self.module), batch, self._pass)
            except ValueError as error:
                warn(f"{error}; launching kernels")
                self.graphed = False
        if self.step:
            return self.step(**batch)
        with self.accelerator.accumulate(self.module):
            return self._pass(batch)

    def _pass(self, batch: dict[str, Tensor]) -> Tensor:
        with self.accelerator.autocast():
            loss = self.forward(**batch).loss
        self.accelerator.backward(loss)
        return loss.detach()

    def reduce_gradients(self) -> None:
        """Average the gradients over the processes, where the backward pass has not."""
        if self.reduces:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            torch.distributed.all_reduce(flat, torch.distributed.ReduceOp.AVG)
            parts = flat.split([gradient.numel() for gradient in gradients])
            # a few launches, where copy_ takes one for each parameter
            parts = [*map(Tensor.view_as, parts, gradients)]
            torch._foreach_copy_(gradients, parts)  # pyright: ignore[reportPrivateImportUsage]

    def _replays(self) -> bool:
        return self.step is not None and self.step.holds_gradients()

    def _change_weights(self) -> None:
        if self.settings.clip_norm:
            self.accelerator.clip_grad_norm_(self.module.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        if self.average:
            self.average.update(self.accelerator.unwrap_model(self.module))

    def whole(self, module: nn.Module) -> nn.Module:
        """Return the model as it is saved, with a module's weights; all processes must ask.

        It is whole in every process, and in the dtype of `save_dtype`.
        """
        if self.result is None:
            return self.accelerator.unwrap_model(module)
        self.result.load_state_dict(whole_weights(module))
        return self.result

    def gradient_is_finite(self) -> bool:
        """Return False if the norm of this process's gradient is NaN or infinite; waits for the device."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return math.isfinite(norm.item())


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile each block of a model by itself, with these options of `torch.compile`.

    All blocks that drop branches share their code. Their rates become tensors for that: numbers can end up as
    constants of the code, which each block would then get for itself.
    """
    for block in model.modules():
        if isinstance(block, FlashKATLayer):
            if block.drop_path.rate != 0.0:
                block.drop_path.rate = torch.as_tensor(block.drop_path.rate, dtype=torch.float32)
            block.compile(**options)
