"""The learned functions of a model, each as an object: call it, read its properties, write its formula.

    for function in model_functions(model, batches):
        print(function.label, function.zeros, function.lipschitz, function.sympy())

A function belongs to one group of channels of one activation: it is a function of one number, applied to each
channel of the group. It is not a formula of the network (docs/functions.md).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..messages import needs
from ..model.coefficients import SIMPLE_FUNCTIONS, WITH_AFFINE_MAPS, start_table
from ..model.layers import GroupRational, SimplifiedActivation, as_rational
from .functions_forms import Affine, Asymptote, Quotient
from .functions_inputs import Inputs, measure_inputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

What = Literal["value", "slope"]
MATTERS = 0.01  # of the output's spread: a coefficient matters that changes the output by more when it is 0
KNOWN: dict[str, Callable[[Tensor], Tensor]] = {  # which a learned function is compared with, as they are
    "zero": torch.zeros_like,
    "identity": torch.clone,
    "relu": torch.relu,
    "leaky_relu": functional.leaky_relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class Place(NamedTuple):
    """A minimum or maximum."""

    kind: Literal["minimum", "maximum"]
    x: float
    y: float


@dataclass(frozen=True)
class LearnedFunction:
    """The function of one group, in float64.

    Attributes:
        module: name of the activation in its model, such as "flashkat.layers.0.mlp.act1".
        group: index of the group.
        name: "rational", or one of `coefficients.SIMPLE_FUNCTIONS` in a simplified model.
        coefficients: of a rational a_0..a_5, then |b_1|..|b_4|; of another as `SIMPLE_FUNCTIONS` says.
        init: start table that training began with.
        inputs: what the group meets; unmeasured, equal weights on [-3, 3].
    """

    module: str
    group: int
    name: str
    coefficients: tuple[float, ...]
    init: str
    inputs: Inputs

    @property
    def act(self) -> str:
        """Return the last part of the module's name, such as "act1"."""
        return self.module.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """Return the last number in the module's name, or None if there is none."""
        numbers = [part for part in self.module.split(".")[:-1] if part.isdecimal()]
        return int(numbers[-1]) if numbers else None

    @property
    def label(self) -> str:
        """Return a name that is also one in Python and C, such as "layer0_act1_group3"."""
        place = f"layer{self.layer}_{self.act}" if self.act in ("act1", "act2") else self.module
        return re.sub(r"\W", "_", f"{place or 'function'}_group{self.group}")

    @property
    def rows(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Return a_0..a_5 and |b_1|..|b_4|, or None where the function is no quotient of polynomials."""
        if self.name in WITH_AFFINE_MAPS:
            return None
        if self.name == "rational":
            return self.coefficients[:6], self.coefficients[6:]
        numerator, denominator = as_rational(self.name, torch.tensor(self.coefficients, dtype=torch.float64))
        return tuple(numerator.tolist()), tuple(denominator.abs().tolist())

    @cached_property
    def form(self) -> Quotient | Affine:
        """Return the formula, which knows its zeros and its other properties."""
        return Affine(self.name, self.coefficients) if self.rows is None else Quotient(*self.rows)

    def __call__(self, x: Any) -> Any:
        """Compute the function of a float, an array or a tensor in float64; the result is of its kind."""
        return in_kind(self.form.value, x)

    def slope(self, x: Any) -> Any:
        """Compute the derivative; arguments and result as for a call."""
        return in_kind(self.form.slope, x)

    @property
    def start(self) -> "LearnedFunction":
        """Return the function that training began with."""
        table = start_table(self.init)
        coefficients = (*table.numerator, *(abs(b) for b in table.denominator))
        return replace(self, name="rational", coefficients=coefficients)

    @property
    def poles(self) -> tuple[float, ...]:
        """Return the poles. There are none: the denominator is 1 plus terms that are never negative."""
        return ()

    @cached_property
    def asymptotes(self) -> tuple[Asymptote | None, Asymptote | None]:
        """Return the lines that it approaches to the left and the right; None where it grows faster."""
        return self.form.asymptotes()

    @cached_property
    def zeros(self) -> tuple[float, ...]:
        """Return where the function is 0, on the whole line; empty for the zero function itself."""
        return self.form.zeros()

    @cached_property
    def extrema(self) -> tuple[Place, ...]:
        """Return the minima and maxima on the whole line; a kink at 0, which |x| can make, counts."""
        places = sorted(set(self.form.turns()))
        return tuple(
            Place("minimum" if before < 0 else "maximum", x, self(x))
            for x, before, after in self._signs_beside(places)
            if before * after < 0
        )

    def _signs_beside(self, places: Sequence[float]) -> Iterable[tuple[float, float, float]]:
        """Yield each place with the sign of the slope before and after it, halfway to its neighbours."""
        if not places:
            return
        ends = [places[0] - 1 - abs(places[0]), *places, places[-1] + 1 + abs(places[-1])]
        between = numpy.array([(a + b) / 2 for a, b in pairwise(ends)])
        signs = numpy.sign(self.slope(between))
        yield from zip(places, signs, signs[1:], strict=False)

    @property
    def range(self) -> tuple[float, float]:
        """Return the 0.1% and the 99.9% quantile of the inputs."""
        return self.inputs.range

    @cached_property
    def lipschitz(self) -> float:
        """Return the largest |slope| in the measured range, exact up to rounding."""
        low, high = self.range
        places = numpy.array([low, high, *(x for x in self.form.steepest() if low <= x <= high)])
        return float(numpy.abs(self.slope(places)).max())

    @cached_property
    def spread(self) -> float:
        """Return the standard deviation of the output over the inputs."""
        y = self(self.inputs.x)
        return float(numpy.sqrt(self.inputs.mean((y - self.inputs.mean(y)) ** 2)))

    def distance(self, other: Callable) -> float:
        """Return the root mean square of the difference to another function, over the inputs."""
        x = self.inputs.x
        return float(numpy.sqrt(self.inputs.mean((self(x) - other(x)) ** 2)))

    @property
    def distance_to_start(self) -> float:
        """Return the `distance` to the function that training began with."""
        return self.distance(self.start)

    @cached_property
    def nearest(self) -> tuple[str, float]:
        """Return the known function at the least `distance`, taken as it is, and that distance."""
        distances = {
            name: self.distance(lambda x, known=known: in_kind(known, x)) for name, known in KNOWN.items()
        }
        name = min(distances, key=distances.__getitem__)
        return name, distances[name]

    @cached_property
    def num_mattering(self) -> int:
        """Return how many coefficients change the output by over 1% of its spread when they are set to 0.

        Each is tried alone; the change is the `distance` to the function with the others as they are.
        """
        count = 0
        for index, value in enumerate(self.coefficients):
            without = (*self.coefficients[:index], 0.0, *self.coefficients[index + 1 :])
            changed = (
                value != 0 and self.distance(replace(self, coefficients=without)) > MATTERS * self.spread
            )
            count += bool(changed)
        return count

    def sympy(self):
        """Return the formula as an expression of sympy in a real `x`, numbers with 17 digits.

        Raises:
            ValueError: sympy is not installed; the message names the extra.
        """
        sympy = needs("sympy", "functions")
        return self.form.sympy(sympy, sympy.Symbol("x", real=True))

    def plot(self, ax: "Axes", what: What = "value", **style: Any) -> None:
        """Draw the function, or its slope, over its range into axes; `style` is that of `Axes.plot`."""
        x = numpy.linspace(*self.range, 400)
        ax.plot(x, (self if what == "value" else self.slope)(x), **{"label": self.label, **style})


def model_functions(
    model: nn.Module,
    batches: Iterable[Tensor] | None = None,
    *,
    layer: int | None = None,
    group: int | None = None,
) -> list[LearnedFunction]:
    """Return the function of each group of each activation, in the model's order.

    Args:
        model: any module that contains a `GroupRational`; its mode stays, no random number is drawn.
        batches: what the model is called with, such as `(batch, channels, height, width)` pixel values; the
            inputs that each function meets are counted. By default a FlashKAT sees images of 1/f noise, which
            has the spectrum of photographs; in another model nothing is measured.
        layer: only of this layer, counted by the last number in the activations' names.
        group: only of this group.

    Raises:
        ValueError: the model contains no such activation, layer or group, or what it meets is not finite.
    """
    acts = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GroupRational | SimplifiedActivation)
    }
    if not acts:
        raise ValueError(f"{type(model).__name__} contains no GroupRational")
    inputs = measure_inputs(model, {name: num_groups(act) for name, act in acts.items()}, batches)
    functions = [
        LearnedFunction(name, index, *_formula(act, index), act.init, inputs[name][index])
        for name, act in acts.items()
        for index in range(num_groups(act))
    ]
    for what, wanted, existing in (
        ("layer", layer, {function.layer for function in functions if function.layer is not None}),
        ("group", group, {function.group for function in functions}),
    ):
        if wanted is not None and wanted not in existing:
            there = f"{min(existing)} to {max(existing)}" if existing else "not numbered"
            raise ValueError(f"there is no {what} {wanted}: the {what}s are {there}")
    return [
        function
        for function in functions
        if layer in (None, function.layer) and group in (None, function.group)
    ]


def num_groups(act: GroupRational | SimplifiedActivation) -> int:
    """Return the number of an activation's groups."""
    return len(act.denominator) if isinstance(act, GroupRational) else len(act.functions)


@torch.no_grad()
def _formula(act: GroupRational | SimplifiedActivation, group: int) -> tuple[str, tuple[float, ...]]:
    """Return a function's name and its coefficients."""
    if isinstance(act, GroupRational):
        if not act.by_kernels:
            degrees = "{} over {}".format(*act.degrees)
            raise ValueError(f"a rational of degree {degrees} in the form {act.form!r} is no LearnedFunction")
        rows = act.numerator[group % len(act.numerator)], act.denominator[group].abs()
        rows = tuple(functional.pad(row, (0, n - len(row))) for row, n in zip(rows, (6, 4), strict=True))
    elif act.functions[group] == "rational":
        rows = act.rational_rows(group, torch.empty(0))
        rows = rows[0], rows[1].abs()
    else:
        own = act.own_coefficients(group, torch.empty(0)).double().tolist()
        return act.functions[group], tuple(own)
    return "rational", tuple(torch.cat(rows).double().tolist())


def in_kind(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Apply a function of float64 vectors to a float, an array or a tensor."""
    values = torch.as_tensor(x, dtype=torch.float64)
    result = function(values.reshape(-1).cpu()).reshape(values.shape)
    if isinstance(x, Tensor):
        return result.to(x.device)
    return result.numpy() if isinstance(x, numpy.ndarray) else result.item()


__all__ = ["SIMPLE_FUNCTIONS", "Asymptote", "LearnedFunction", "Place", "model_functions"]
