"""The layers of a Kolmogorov-Arnold Transformer that a plain ViT does not have."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .coefficients import SIMPLE_FUNCTIONS, WITH_AFFINE_MAPS, degrees, start_table
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


class SimplifiedActivation(nn.Module):
    """A group-rational activation in which simpler functions stand for the rationals of some groups.

    Args:
        hidden_size: channels of the input; a multiple of the number of groups.
        functions: name of each group's function: "rational", or one of `coefficients.SIMPLE_FUNCTIONS`.
        num_numerator_groups: rows of the rationals' numerator as in `GroupRational`: 1, or as many as groups.
        init: start table of the rationals.

    The rationals keep their rows in `numerator` and `denominator`; `coefficients` has those of the other
    functions, group by group. Polynomials and lower-degree rationals are rationals with zeros in their rows,
    so one operator serves them all.

    Shape: `(..., hidden_size)` in and out, same dtype; float32 arithmetic, float64 for float64.
    """

    numerator: nn.Parameter | None
    denominator: nn.Parameter | None
    coefficients: nn.Parameter | None

    def __init__(
        self, hidden_size: int, functions: Sequence[str], num_numerator_groups: int = 1, init: str = "swish"
    ):
        super().__init__()
        if hidden_size % len(functions):
            raise ValueError(
                f"hidden_size ({hidden_size}) must be a multiple of the {len(functions)} functions' number"
            )
        self.hidden_size = hidden_size
        self.functions = tuple(functions)
        self.init = init
        num_rationals = self.functions.count("rational")
        self.lengths = [len(SIMPLE_FUNCTIONS.get(name, ())) for name in self.functions]
        self.runs: list[tuple[int, int]] = []  # first and last + 1 of neighbours that one operator serves
        for group, name in enumerate(self.functions):
            joins = group and not {name, self.functions[group - 1]} & set(WITH_AFFINE_MAPS)
            self.runs.append((self.runs.pop()[0] if joins else group, group + 1))
        self.rows = min(num_numerator_groups, num_rationals), num_rationals
        starts = self.start()
        for name in ("numerator", "denominator", "coefficients"):  # None where empty: DDP wants gradients
            self.register_parameter(name, nn.Parameter(starts[name].clone()) if name in starts else None)

    def start(self) -> dict[str, Tensor]:
        """Return the start values of the parameters that there are, by their names, float32 on the CPU."""
        table = start_table(self.init)
        starts = {
            "numerator": torch.tensor(table.numerator).repeat(self.rows[0], 1),
            "denominator": torch.tensor(table.denominator).repeat(self.rows[1], 1),
            "coefficients": torch.tensor(
                [value for name in self.functions for value in SIMPLE_FUNCTIONS.get(name, ())]
            ),
        }
        return {name: start for name, start in starts.items() if len(start)}

    def forward(self, x: Tensor) -> Tensor:
        if set(self.functions) == {"identity"}:
            return x
        width, dtype = self.hidden_size // len(self.functions), torch.promote_types(x.dtype, torch.float32)
        none = x.new_empty(0, dtype=dtype)
        pieces = []
        for first, last in self.runs:
            piece, name = x[..., first * width : last * width], self.functions[first]
            if name in WITH_AFFINE_MAPS:
                y = affine_function(name, piece.to(dtype), self.own_coefficients(first, none)).to(x.dtype)
            else:
                rows = [self.rational_rows(group, none) for group in range(first, last)]
                y = rational(piece, *(torch.stack(table) for table in zip(*rows, strict=True)))
            pieces.append(y)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def own_coefficients(self, group: int, none: Tensor) -> Tensor:
        """Return the part of `coefficients` that belongs to a group; `none` where there are none at all."""
        first = sum(self.lengths[:group])
        return none if self.coefficients is None else self.coefficients[first : first + self.lengths[group]]

    def rational_rows(self, group: int, none: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(6,)` and `(4,)` of a group whose function is a quotient; `none` as above."""
        if self.numerator is None or self.denominator is None or self.functions[group] != "rational":
            return as_rational(self.functions[group], self.own_coefficients(group, none))
        row = self.functions[:group].count("rational")
        return self.numerator[row % len(self.numerator)], self.denominator[row]

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {', '.join(self.functions)}"


def as_rational(name: str, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows `(6,)` and `(4,)` of a polynomial or a lower-degree rational of that name."""
    if name == "identity":
        return functional.pad(coefficients.new_ones(1), (1, 4)), coefficients.new_zeros(4)
    upper, lower = degrees(name)
    numerator, denominator = coefficients.split([upper + 1, lower])
    return functional.pad(numerator, (0, 5 - upper)), functional.pad(denominator, (0, 4 - lower))


def affine_function(name: str, x: Tensor, coefficients: Tensor) -> Tensor:
    """Compute `r * f(p * x + q) + s` for f of that name in `WITH_AFFINE_MAPS`, in x's dtype.

    Args:
        name: of f.
        x: any shape, float32 or float64.
        coefficients: p, q, r, s; for leaky_relu also its slope below zero.
    """
    p, q, r, s, *slope = coefficients.to(x.dtype)
    inner = p * x + q
    if name == "leaky_relu":
        return r * torch.where(inner < 0, slope[0] * inner, inner) + s
    return r * getattr(functional if name in ("relu", "gelu", "silu") else torch, name)(inner) + s


def activation(
    hidden_size: int,
    num_groups: int,
    num_numerator_groups: int,
    init: str,
    functions: Sequence[str] | None = None,
) -> GroupRational | SimplifiedActivation:
    """Return a `SimplifiedActivation` where `functions` names any but rationals, else a `GroupRational`."""
    if functions is None or set(functions) == {"rational"}:
        return GroupRational(hidden_size, num_groups, num_numerator_groups, init)
    return SimplifiedActivation(hidden_size, functions, num_numerator_groups, init)


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
        act1_functions: name of each group's function in the first activation, as in `SimplifiedActivation`;
            by default all are rationals.
        act2_functions: the same for the second activation.

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
        act1_functions: Sequence[str] | None = None,
        act2_functions: Sequence[str] | None = None,
    ):
        super().__init__()
        rows = num_groups, num_numerator_groups
        self.act1 = activation(hidden_size, *rows, act1_init, act1_functions)
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.act2 = activation(intermediate_size, *rows, act2_init, act2_functions)
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
