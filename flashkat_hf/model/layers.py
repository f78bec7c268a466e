"""The layers of a Kolmogorov-Arnold Transformer that a plain ViT does not have."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .coefficients import SIMPLE_FUNCTIONS, WITH_AFFINE_MAPS, degrees, start_table
from .fitting import fit_rational
from .fusing import fused_mlp, fuses_mlp, fusible, working_dtype
from .op_rational import rational
from .reference import FORMS, in_dtype, rational_of_form

KERNEL_DEGREES = (5, 4)
MAX_ROW = 2**16  # numbers C * H * W of an image; a CPU's cache does not hold the coefficients of a longer row
FEW_ROWS = (
    32  # images; the sums that backward keeps on a GPU would be large beside fewer images of longer rows
)


@fusible
class GroupRational(nn.Module):
    """One learned rational activation for each group of neighbouring channels.

    Args:
        hidden_size: channels of the input; a multiple of `num_groups`.
        num_groups: groups of channels; channel c belongs to group `c // (hidden_size // num_groups)`.
        num_numerator_groups: rows of the numerator, 1 (shared, as in the released checkpoints) or
            `num_groups`.
        init: start table, a name in `coefficients.START_TABLES`. The tables were fitted to the form "terms";
            their odd terms are next to zero, so they hold for "sum" within 2e-3 on [-8, 8].
        dim: dimension of the channels: -1, or 1 for images `(N, C, H, W)`.
        degrees: of numerator and denominator, 1 at least. Kernels serve up to (5, 4) in the form "terms", in
            plain PyTorch the rest runs. A table that is longer than that cannot start a shorter one.
        form: of the denominator, "terms" or "sum" as in `reference.FORMS`: other people's checkpoints need
            the one that they were trained with.
        device: of the parameters.
        dtype: of the parameters.

    Shape: channels in dimension `dim`, out as in, same dtype.
    """

    def __init__(
        self,
        hidden_size: int,
        num_groups: int = 8,
        num_numerator_groups: int = 1,
        init: str = "swish",
        *,
        dim: int = -1,
        degrees: tuple[int, int] = KERNEL_DEGREES,
        form: str = "terms",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_groups < 1 or hidden_size % num_groups:
            raise ValueError(f"hidden_size ({hidden_size}) must be a multiple of num_groups ({num_groups})")
        if num_numerator_groups not in (1, num_groups):
            raise ValueError(
                f"num_numerator_groups ({num_numerator_groups}) must be 1 or num_groups ({num_groups})"
            )
        if len(degrees) != 2 or min(degrees) < 1:
            raise ValueError(f"degrees ({degrees}) must be two numbers, each at least 1")
        if form not in FORMS:
            raise ValueError(f"form ({form!r}) must be one of {', '.join(FORMS)}")
        self.hidden_size = hidden_size
        self.init = init
        self.dim = dim
        self.degrees = (degrees[0], degrees[1])
        self.form = form
        self.by_kernels = form == "terms" and degrees[0] <= 5 and degrees[1] <= 4
        # whether a kernel that stands for several modules may stand for this one, too
        self.is_plain = dim == -1 and self.degrees == KERNEL_DEGREES and form == "terms"
        factory = {"device": device, "dtype": dtype}
        self.numerator = nn.Parameter(torch.empty(num_numerator_groups, degrees[0] + 1, **factory))
        self.denominator = nn.Parameter(torch.empty(num_groups, degrees[1], **factory))
        self.reset_parameters()

    def start(self) -> tuple[Tensor, Tensor]:
        """Return the start table in the shapes of the parameters, float32 on the CPU."""
        rows = []
        for row, parameter in zip(start_table(self.init), (self.numerator, self.denominator), strict=True):
            columns = parameter.shape[1]
            if any(row[columns:]):
                degrees = "{} over {}".format(*self.degrees)
                raise ValueError(
                    f"the start table {self.init!r} is of degree 5 over 4 and cannot start a rational of "
                    f'degree {degrees}; use init="identity" and then fit()'
                )
            row = torch.tensor((*row, *[0.0] * columns)[:columns])
            rows.append(row.expand(parameter.shape))
        return rows[0], rows[1]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the parameters with the start table."""
        for parameter, start in zip((self.numerator, self.denominator), self.start(), strict=True):
            parameter.copy_(start)

    @torch.no_grad()
    def fit(self, target: Callable[[Tensor], Tensor] | Tensor, x: Tensor | None = None) -> float:
        """Fill the parameters so that every group comes as close as it can to a function, or to samples.

        Args:
            target: an elementwise function, such as `torch.sin`, or its values at `x`.
            x: where they are compared, any shape, such as what the activation meets; by default 1,001 points
                on [-5, 5].

        Returns:
            The largest difference at `x`.

        Raises:
            ValueError: as `fitting.fit_rational`.
        """
        numerator, denominator, error = fit_rational(target, x, self.degrees, self.form)
        self.numerator.copy_(numerator.expand(self.numerator.shape))
        self.denominator.copy_(denominator.expand(self.denominator.shape))
        return error

    def forward(self, x: Tensor) -> Tensor:
        if not -x.ndim <= self.dim < x.ndim or x.shape[self.dim] != self.hidden_size:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, but x of shape {tuple(x.shape)} has another size in "
                f"dimension {self.dim}; GroupRational(dim=...) says which dimension the channels are"
            )
        if self.dim in (-1, x.ndim - 1):
            return self.over_last_dimension(x)
        # (N, C, H, W) is (N, C * H * W): a group is a run of neighbours there, too
        last, row = x.movedim(self.dim, -1), math.prod(x.shape[self.dim % x.ndim :])
        few = torch.is_grad_enabled() and x.numel() < FEW_ROWS * row
        if last.is_contiguous() or (row > MAX_ROW and (x.device.type == "cpu" or few)):
            return self.over_last_dimension(last).movedim(-1, self.dim)
        return self.over_last_dimension(x.flatten(self.dim)).view(x.shape)

    def over_last_dimension(self, x: Tensor) -> Tensor:
        """Apply the rationals to rows that are runs of equally many neighbours of each group."""
        if not self.by_kernels:
            return rational_of_form(x, self.numerator, self.denominator, self.form)
        numerator, denominator = self.numerator, self.denominator
        if self.degrees != KERNEL_DEGREES:
            numerator = functional.pad(numerator, (0, 6 - numerator.shape[1]))
            denominator = functional.pad(denominator, (0, 4 - denominator.shape[1]))
        return rational(x, numerator, denominator)

    def extra_repr(self) -> str:
        text = f"{self.hidden_size}, num_groups={len(self.denominator)}"
        text += f", num_numerator_groups={len(self.numerator)}, init={self.init!r}"
        defaults = {"dim": -1, "degrees": KERNEL_DEGREES, "form": "terms"}
        values = {name: getattr(self, name) for name in defaults}
        return text + "".join(f", {k}={v!r}" for k, v in values.items() if v != defaults[k])


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
        bias: whether the linear maps have biases; without them no kernel stands for map and activation.

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
        bias: bool = True,
    ):
        super().__init__()
        rows = num_groups, num_numerator_groups
        self.act1 = activation(hidden_size, *rows, act1_init, act1_functions)
        self.fc1 = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.act2 = activation(intermediate_size, *rows, act2_init, act2_functions)
        self.fc2 = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # Layer norm gives float32 under autocast, and fc1 would round after act1 anyway.
        return self.after_act1(self.act1(in_dtype(working_dtype(x), x)))

    def after_act1(self, x: Tensor) -> Tensor:
        """Compute what follows the first activation: fc2(act2(fc1(x)))."""
        x = self.dropout(x)
        if fuses_mlp(self, x):
            return fused_mlp(self, x, self.fc2.bias)
        return self.fc2(self.dropout(self.act2(self.fc1(x))))
