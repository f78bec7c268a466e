"""The model of a run as accelerate prepares it, with its optimiser and its averaged weights."""

import copy
import math
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from ..model.modeling_flashkat import FlashKATLayer
from .optimization import AveragedWeights, make_optimizer, whole_weights
from .plan import Plan


class PreparedModel:
    """A model on its device, compiled and sharded as planned, with what changes its weights."""

    def __init__(self, plan: Plan, accelerator: Accelerator, model: nn.Module, processor: Any):
        settings, device = plan.settings, accelerator.device
        self.accelerator = accelerator
        self.processor = processor
        self.unsharded = copy.deepcopy(model).to(device) if plan.sharded else None
        self.average = AveragedWeights(model, settings.ema_decay) if settings.ema_decay else None
        optimizer = make_optimizer(model, settings, device)
        accelerator.gradient_accumulation_steps = plan.accumulate
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            config = cast(Any, accelerator.state.deepspeed_plugin).deepspeed_config
            config["train_micro_batch_size_per_gpu"] = plan.micro_batch
            config["gradient_accumulation_steps"] = plan.accumulate
        if plan.compiled and plan.sharded:  # block by block: the gathering of shards stays outside
            for block in model.modules():
                if isinstance(block, FlashKATLayer):
                    block.compile()
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

    def whole(self, module: nn.Module) -> nn.Module:
        """Return the model itself with a module's weights, whole in every process; all of them must ask."""
        if self.unsharded is None:
            return self.accelerator.unwrap_model(module)
        self.unsharded.load_state_dict(whole_weights(module))
        return self.unsharded

    def gradient_is_finite(self) -> bool:
        """Return False if the norm of this process's gradient is NaN or infinite; waits for the device."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        norm = norm if self.unsharded is None else norm.full_tensor()
        return math.isfinite(norm.item())
