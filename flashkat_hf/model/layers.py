"""The two layers of a Kolmogorov-Arnold Transformer that a plain ViT does not have."""

import torch
from torch import Tensor, nn

from .coefficients import start_table
from .fusing import fused_mlp, fuses_mlp, fusible, working_dtype
from .op_rational import rational


@fusible
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
        self.hidden_size = hidden_size
        self.init = init
        self.numerator = nn.Parameter(torch.empty(num_numerator_groups, 6))
        self.denominator = nn.Parameter(torch.empty(num_groups, 4))
        with torch.no_grad():
            for parameter, start in zip((self.numerator, self.denominator), self.start(), strict=True):
                parameter.copy_(start)

    def start(self) -> tuple[Tensor, Tensor]:
        """Return the start table in the shapes of the parameters, float32 on the CPU."""
        table = start_table(self.init)
        numerator, denominator = torch.tensor(table.numerator), torch.tensor(table.denominator)
        return numerator.expand(self.numerator.shape), denominator.expand(self.denominator.shape)

    def forward(self, x: Tensor) -> Tensor:
        return rational(x, self.numerator, self.denominator)

    def extra_repr(self) -> str:
        groups = f"num_groups={len(self.denominator)}, num_numerator_groups={len(self.numerator)}"
        return f"{self.hidden_size}, {groups}, init={self.init!r}"


@fusible
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

    def forward(self, x: Tensor) -> Tensor:
        # Layer norm gives float32 under autocast, and fc1 would round after act1 anyway.
        return self.after_act1(self.act1(x.to(working_dtype(x))))

    def after_act1(self, x: Tensor) -> Tensor:
        """Compute what follows the first activation: fc2(act2(fc1(x)))."""
        x = self.dropout(x)
        if fuses_mlp(self, x):
            return fused_mlp(self, x, self.fc2.bias)
        return self.fc2(self.dropout(self.act2(self.fc1(x))))
