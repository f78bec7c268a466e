"""All that changes the weights: parameter groups, optimiser, schedule, mixed labels, averages; all timm's."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from ..data.seeding import seed_generators
from ..messages import extra
from .recipe import Settings

UNDECAYED = ("*cls_token", "*position_embeddings", "*pos_embed")  # and what has one dimension: biases, norms
COEFFICIENTS = ("*.numerator", "*.denominator", "*.coefficients")  # the last of simplified activations


def seed_update(seed: int, rank: int, step: int) -> None:
    """Seed Python, NumPy and PyTorch for one update, so that a resumed run draws what a whole one does."""
    seed_generators(seed, rank, step)


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_coefficients: bool = True, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay and, with `layer_decay`, by depth.

    Matrices decay, and the rational coefficients unless told otherwise; biases, norms, positions and the cls
    token do not. With `layer_decay` a group has an `lr_scale`: 1 for the head, and one power more for each
    block further down, the embeddings last; the last norm goes with the last block.
    """
    optim = extra("timm.optim")
    undecayed = UNDECAYED if decay_coefficients else UNDECAYED + COEFFICIENTS
    if layer_decay in (None, 1.0):
        return optim.param_groups_weight_decay(model, weight_decay, no_weight_decay_list=undecayed)
    matcher = {
        "stem": r".*flashkat\.embeddings\.",
        "blocks": [(r".*flashkat\.layers\.(\d+)\.", None), (r".*flashkat\.norm\.", (99999,))],
    }
    setattr(model, "group_matcher", lambda coarse: matcher)  # noqa: B010 - where timm looks
    try:
        return optim.param_groups_layer_decay(model, weight_decay, undecayed, layer_decay=layer_decay)
    finally:
        del model.group_matcher


def make_optimizer(model: nn.Module, settings: Settings, device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW over the model's parameter groups, fused where PyTorch has it."""
    groups = parameter_groups(model, settings.weight_decay, settings.decay_coefficients, settings.layer_decay)
    options = {"betas": (settings.beta1, settings.beta2), "fused": device.type in ("cuda", "cpu")}
    return torch.optim.AdamW(groups, lr=settings.learning_rate, eps=settings.eps, **options)


class Schedule:
    """timm's cosine with a linear warm-up, by epoch or by update; a function of where the run stands."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        updates_per_epoch: int,
        device: torch.device | None = None,
    ):
        """Prepare a schedule.

        Args:
            optimizer: its groups' learning rates are set.
            settings: the run's.
            updates_per_epoch: of the run.
            device: where the rates are, as tensors that a CUDA graph can read; default: numbers.
        """
        self.optimizer = optimizer
        self.by_epoch = settings.schedule == "epoch"
        self.updates_per_epoch = updates_per_epoch
        self.unit = 1 if self.by_epoch else updates_per_epoch  # steps of the cosine in an epoch
        groups = optimizer.param_groups
        self.tensors = [torch.zeros((), device=device) for _ in groups] if device else []
        self.spread(settings)

    def spread(self, settings: Settings) -> None:
        """Spread the schedule over the epochs of the settings, or over one as long as they are open."""
        self.cosine = extra("timm.scheduler").CosineLRScheduler(
            self.optimizer,
            t_initial=(settings.epochs or 1) * self.unit,
            lr_min=settings.min_learning_rate,
            warmup_t=(settings.warmup_epochs or 0) * self.unit,
            warmup_lr_init=settings.warmup_learning_rate,
        )

    def rest(self) -> None:
        """Set every group's learning rate to 0: updates then change no weight."""
        self._put([0.0] * len(self.optimizer.param_groups))

    def set(self, epoch: int, update: int) -> float:
        """Set every group's learning rate for update `update` of epoch `epoch`, and return the highest."""
        self.cosine.step(epoch * self.unit + (0 if self.by_epoch else update))
        rate = self.rate
        self._put([group["lr"] for group in self.optimizer.param_groups])
        return rate

    def _put(self, rates: list[float]) -> None:
        """Write the groups' learning rates where the update reads them."""
        groups = self.optimizer.param_groups
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        for group, tensor in zip(groups, self.tensors, strict=False):
            group["lr"] = tensor.fill_(group["lr"])
            group["capturable"] = True

    @property
    def rate(self) -> float:
        """The highest learning rate of the groups; on a GPU it waits for the device."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def curve(self, num_steps: int) -> list[tuple[int, float]]:
        """Return step and rate of at most 2,000 updates of a run that has ended."""
        steps = range(0, num_steps, -(-num_steps // 2000))
        return [(step + 1, self.set(*divmod(step, self.updates_per_epoch))) for step in steps]


class Mixing:
    """Mixup and cutmix of a batch on its device, and smoothed labels; draws from NumPy's global generator."""

    def __init__(self, settings: Settings, num_labels: int):
        mixup = extra("timm.data.mixup")
        self.num_labels = num_labels
        self.smoothing = settings.label_smoothing
        self.smooth = mixup.mixup_target
        self.mix = None
        if settings.mixup or settings.cutmix:
            self.mix = mixup.Mixup(
                mixup_alpha=settings.mixup,
                cutmix_alpha=settings.cutmix,
                prob=1.0 if settings.mix_probability is None else settings.mix_probability,
                switch_prob=settings.mix_switch,
                label_smoothing=settings.label_smoothing,
                num_classes=num_labels,
            )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return images `(batch, channels, height, width)`, mixed in place, and their class probabilities."""
        if self.mix:
            return self.mix(images, labels)
        return images, self.smooth(labels, self.num_labels, smoothing=self.smoothing)


class AveragedWeights:
    """timm's exponential moving average of the weights, without a warm-up, sharded where the model is.

    It is made before the model is prepared, and prepared after it.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.average = extra("timm.utils").ModelEmaV3(model, decay=decay)

    @property
    def module(self) -> nn.Module:
        return self.average.module

    def prepare(self, accelerator: Accelerator) -> None:
        """Move the average to the device, sharded as the model, and register it for checkpoints."""
        if accelerator.is_fsdp2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            self.average.module = fsdp2_prepare_model(accelerator, self.average.module)
        self.average.to(accelerator.device)
        accelerator.register_for_checkpointing(self)

    def update(self, model: nn.Module) -> None:
        self.average.update(model)

    def state_dict(self) -> dict[str, Tensor]:
        return whole_weights(self.module, cpu=True)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        set_model_state_dict(self.module, state, options=StateDictOptions(full_state_dict=True))  # pyright: ignore[reportArgumentType]


def whole_weights(module: nn.Module, cpu: bool = False) -> dict[str, Any]:
    """Return the state dict of a module, whole in every process where it is sharded; all of them must ask."""
    state: dict[str, Any] = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    return {name: tensor.cpu() if cpu else tensor for name, tensor in state.items()}
