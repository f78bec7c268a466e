"""The two layers of a Kolmogorov-Arnold Transformer that a plain ViT does not have."""

import torch
from torch import Tensor, nn

from .coefficients import start_table
from .fused_ops import norm_beside, rational_mlp
from .ops import TRITON_DEVICES, rational


def fusible(x: Tensor, *modules: nn.Module) -> bool:
    """Whether one kernel may stand for several modules.

    On a GPU, if none was replaced (LoRA) or is listened to.
    """
    plain = nn.Linear, nn.LayerNorm, GroupRational
    return x.device.type in TRITON_DEVICES and all(
        type(module) in plain and not hooked(module) for module in modules
    )


def hooked(module: nn.Module) -> bool:
    """Whether someone listens to what goes into a module or comes out."""
    forward, backward = module._forward_hooks, module._backward_hooks
    return bool(forward or backward or module._forward_pre_hooks or module._backward_pre_hooks)


def pre_norm(norm: nn.LayerNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """A residual stream, to go on with, and its norm.

    On a GPU in eager mode by one kernel, in `working_dtype`.
    """
    if fusible(x, norm) and not torch.compiler.is_compiling() and x.is_contiguous():
        return norm_beside(x, norm.weight, norm.bias, norm.eps, working_dtype(x))
    return x, norm(x)


def working_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class GroupRational(nn.Module):
    """One learned rational activation for each group of neighbouring channels.

    Args:
        hidden_size: channels of the input; a multiple of `num_groups`.
        num_groups: groups of channels; channel c belongs to group `c // (hidden_size // num_groups)`.
        num_numerator_groups: rows of the numerator, 1 (shared, as in the released checkpoints) or
            `num_groups`.
        init: start table, a name in `coefficients.START_TABLES`.

    Shape: `(..., hidden_size)` in and out, same dtype.
    """

    def __init__(
        self, hidden_size: int, num_groups: int = 8, num_numerator_groups: int = 1, init: str = "swish"
    ):
        super().__init__()
        if hidden_size % num_groups:
            raise ValueError(f"hidden_size ({hidden_size}) must be a multiple of num_groups ({num_groups})")
        if num_numerator_groups not in (1, num_groups):
            raise ValueError(
                f"num_numerator_groups ({num_numerator_groups}) must be 1 or num_groups ({num_groups})"
            )
        self.hidden_size, self.init = hidden_size, init
        self.numerator = nn.Parameter(torch.empty(num_numerator_groups, 6))
        self.denominator = nn.Parameter(torch.empty(num_groups, 4))
        with torch.no_grad():
            for parameter, start in zip((self.numerator, self.denominator), self.start(), strict=True):
                parameter.copy_(start)

    def start(self) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of the start table, in the shapes of the parameters, float32 on the CPU."""
        table = start_table(self.init)
        numerator, denominator = torch.tensor(table.numerator), torch.tensor(table.denominator)
        return numerator.expand(self.numerator.shape), denominator.expand(self.denominator.shape)

    def forward(self, x: Tensor) -> Tensor:
        return rational(x, self.numerator, self.denominator)

    def extra_repr(self) -> str:
        groups = f"num_groups={len(self.denominator)}, num_numerator_groups={len(self.numerator)}"
        return f"{self.hidden_size}, {groups}, init={self.init!r}"


class GRKANMlp(nn.Module):
    """The KAT block's MLP, two group-rational KAN layers.

    Fc2(act2(fc1(act1(x)))), with dropout before each map.

    Args:
        hidden_size: channels in and out.
        intermediate_size: channels between the two linear maps.
        num_groups: groups of both activations.
        num_numerator_groups: rows of both numerators, 1 or `num_groups`.
        act1_init: start table of the first activation; identity starts as a plain MLP.
        act2_init: start table of the second activation.
        dropout: probability of dropping a channel after each activation, in training.

    Shape: `(..., hidden_size)` in and out. Under autocast the MLP works in autocast's dtype from its input
    on.

    Source: Yang and Wang, Kolmogorov-Arnold Transformer, ICLR 2025, section 4.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_groups: int = 8,
        num_numerator_groups: int = 1,
        act1_init: str = "identity",
        act2_init: str = "swish",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.act1 = GroupRational(hidden_size, num_groups, num_numerator_groups, act1_init)
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.act2 = GroupRational(intermediate_size, num_groups, num_numerator_groups, act2_init)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, activated: bool = False, record_bias: bool = True) -> Tensor:
        """The MLP of x; `activated` says that x has already passed act1.

        Without `record_bias`, which only a `fused` MLP allows, fc2's bias gets no gradient here.
        """
        dtype = working_dtype(x)
        x = x.to(dtype)  # layer norm gives float32 under autocast, and fc1 would round after act1 anyway
        x = self.dropout(x if activated else self.act1(x))
        if not self.fused(x):
            return self.fc2(self.dropout(self.act2(self.fc1(x))))
        weight, out_weight = self.fc1.weight.to(dtype), self.fc2.weight.to(dtype)
        out_bias = self.fc2.bias if record_bias else self.fc2.bias.detach()
        tables = self.act2.numerator, self.act2.denominator
        return rational_mlp(x, weight, self.fc1.bias, *tables, out_weight, out_bias)

    def fused(self, x: Tensor) -> bool:
        """Whether act2 is done beside the linear maps around it."""
        return fusible(x, self.fc1, self.act2, self.fc2) and not (self.training and self.dropout.p)
