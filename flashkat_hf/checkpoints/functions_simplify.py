"""Rationals replaced by the simplest known function that fits them on the inputs that they meet.

Each candidate of `SIMPLE_FUNCTIONS` is fitted to a group's function g by least squares,

    minimise  sum over bins x of w(x) (f(x) - g(x))^2        w(x): part of the group's inputs in the bin

and the simplest whose root mean square error is at most `tolerance` times the standard deviation of g's
output takes its place: a function that has a name before a polynomial, a polynomial before a rational of
lower degree (`_tiers`). A named f has an affine map of its input and its output, r * f(p * x + q) + s;
polynomials and rationals have their own coefficients. For given p and q the best r and s are
those of a linear fit, so the search is over two numbers: a grid, then scipy's `least_squares`.

The function is only as good as the inputs were: where none was met, f may be anything.
"""

import copy
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..messages import needs
from ..model.coefficients import SIMPLE_FUNCTIONS, WITH_AFFINE_MAPS, degrees
from ..model.layers import SimplifiedActivation
from ..model.modeling_flashkat import FlashKATModel
from .functions import LearnedFunction, model_functions
from .functions_formats import formula

ROUNDING = 1e-7  # of the output's root mean square: as far as float32 coefficients go
SCALES = tuple(
    sign * 2.0**power for power in range(-3, 4) for sign in (1, -1)
)  # of the input, over its spread
SHIFTS = numpy.linspace(-3, 3, 13)
ALIKE = 1.01  # errors within this factor are equal: tanh and sigmoid, where the smaller offset decides
POINTS = 256  # that a fit looks at


@dataclass(frozen=True)
class Choice:
    """The replacement of one function by a simpler one, or the decision to keep it.

    Attributes:
        before: the function of the model.
        after: the one that stands for it, or the closest that was not close enough.
        error: root mean square of the difference over the inputs, in standard deviations of the output.
        replaced: whether `after` is in the simplified model.
    """

    before: LearnedFunction
    after: LearnedFunction
    error: float
    replaced: bool


@dataclass(frozen=True)
class Simplification:
    """A simplified model and what was done to it.

    Attributes:
        model: a copy with `SimplifiedActivation`s; a FlashKAT's config names the functions.
        choices: one for each function of the original, in its order.
        parameters: of the activations, before and after.
        tolerance: that was asked for.
    """

    model: nn.Module
    choices: list[Choice]
    parameters: tuple[int, int]
    tolerance: float

    @property
    def num_replaced(self) -> int:
        """Return how many functions were replaced."""
        return sum(choice.replaced for choice in self.choices)

    def __str__(self) -> str:
        """Return a report for people: each function, and what was saved."""
        rows = [("function", "by", "error", "y =")]
        for choice in self.choices:
            how = choice.after.name if choice.replaced else f"kept; closest {choice.after.name}"
            text = formula(choice.after, 4) if choice.replaced else ""
            rows.append((choice.before.label, how, f"{choice.error:.2%}", text))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]
            ).rstrip()
            for row in rows
        ]
        names = [choice.after.name for choice in self.choices if choice.replaced]
        kinds = ", ".join(f"{names.count(name)} {name}" for name in SIMPLE_FUNCTIONS if name in names)
        old, new = self.parameters
        change = f"{old - new:,} saved" if new <= old else f"{new - old:,} more, as groups shared a numerator"
        kept = len(self.choices) - len(names)
        lines += [
            "errors are root mean squares over the inputs, in standard deviations of the output",
            f"{len(names)} of {len(self.choices)} functions replaced{f': {kinds}' if kinds else ''}",
            *([f"{kept} kept: nothing simpler within {self.tolerance:g} of their spread"] if kept else []),
            f"parameters of the activations: {old:,} before, {new:,} after ({change})",
        ]
        return "\n".join(lines)


def simplify(model: nn.Module, batches: Iterable[Tensor], tolerance: float) -> Simplification:
    """Replace each rational by the simplest known function that fits within a tolerance.

    Args:
        model: a module that contains a `GroupRational`; it stays as it is. Functions that an earlier
            simplification has put in stay, too.
        batches: what the model is called with, to see which inputs each function meets.
        tolerance: largest error, in standard deviations of the function's output over its inputs.

    Raises:
        ValueError: the tolerance is not positive, scipy is missing, or as `model_functions`.
    """
    if not 0 < tolerance < float("inf"):
        raise ValueError(f"the tolerance must be positive, not {tolerance:g}")
    needs("scipy.optimize", "functions")
    choices = [_choose(function, tolerance) for function in model_functions(model, batches)]
    simplified = copy.deepcopy(model)
    before = after = 0
    for module, group_choices in groupby(choices, lambda choice: choice.before.module):
        old = model.get_submodule(module) if module else model
        before += sum(parameter.numel() for parameter in old.parameters())
        new = _module(old, list(group_choices))
        after += sum(parameter.numel() for parameter in new.parameters())
        if module:
            parent, _, name = module.rpartition(".")
            setattr(simplified.get_submodule(parent), name, new)
        else:
            simplified = new
    _name_in_config(simplified)
    return Simplification(simplified, choices, (before, after), tolerance)


def _choose(function: LearnedFunction, tolerance: float) -> Choice:
    if function.name != "rational":
        return Choice(function, function, 0.0, False)
    x, weight = _points(function)
    y = numpy.asarray(function(x))
    mean = weight @ y
    spread = float(numpy.sqrt(weight @ (y - mean) ** 2))
    allowed = tolerance * spread + ROUNDING * float(numpy.sqrt(weight @ y**2))
    closest: tuple[float, LearnedFunction] | None = None
    for names in _tiers():
        fits = []
        for name in names:
            coefficients = fit(name, x, weight, y)
            # as it will be stored
            rounded = tuple(torch.tensor(coefficients, dtype=torch.float32).double().tolist())
            candidate = replace(function, name=name, coefficients=rounded)
            fits.append((float(numpy.sqrt(weight @ (candidate(x) - y) ** 2)), candidate))
        best = min(fits, key=lambda fit: fit[0])
        alike = [one for one in fits if one[0] <= max(ALIKE * best[0], ROUNDING)]
        if len(alike) > 1 and all(one[1].name in WITH_AFFINE_MAPS for one in alike):  # tanh and sigmoid
            best = min(alike, key=lambda fit: abs(fit[1].coefficients[3]))
        if closest is None or best[0] < closest[0]:
            closest = best
        if best[0] <= allowed:
            return Choice(function, best[1], best[0] / spread if spread else 0.0, True)
    assert closest is not None
    return Choice(function, closest[1], closest[0] / spread if spread else float("inf"), False)


@functools.cache
def _tiers() -> list[list[str]]:
    """Return the candidates, the simplest first: known functions by name, then formulas by their length.

    Of a tier the one that fits best is taken: of the known functions behind ReLU, which is the plainest, and
    of rationals with as many coefficients.
    """
    before = ["zero", "identity", "linear", "relu"]
    bent = ["leaky_relu", "gelu", "silu", "tanh", "sigmoid"]
    rationals = [name for name in SIMPLE_FUNCTIONS if name.startswith("rational_")]
    by_length = [list(names) for _, names in groupby(rationals, lambda name: len(SIMPLE_FUNCTIONS[name]))]
    return [*([name] for name in before), bent, ["polynomial_2"], ["polynomial_3"], *by_length]


def _points(function: LearnedFunction) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return at most `POINTS` inputs and their weights: neighbouring bins joined, far tails kept."""
    x, weight = function.inputs.x, function.inputs.weight
    size = -(-len(x) // POINTS)
    starts = numpy.arange(0, len(x), size)
    joined = numpy.add.reduceat(weight, starts)
    return numpy.add.reduceat(x * weight, starts) / joined, joined


def fit(name: str, x: numpy.ndarray, weight: numpy.ndarray, y: numpy.ndarray) -> tuple[float, ...]:
    """Return the coefficients of a simple function that fit `y` at `x` best, by weighted least squares."""
    if name in ("zero", "identity"):
        return ()
    if name in WITH_AFFINE_MAPS:
        return _fit_affine(name, x, weight, y)
    root = numpy.sqrt(weight)
    upper, lower = degrees(name)
    powers = x[:, None] ** numpy.arange(upper + 1)
    if not lower:
        return tuple(_solve(powers, root, y))
    return _fit_rational(x, root, y, upper, lower)


def _solve(columns: numpy.ndarray, root: numpy.ndarray, y: numpy.ndarray) -> numpy.ndarray:
    """Return the weighted least squares of `columns @ result = y`, with columns scaled alike."""
    weighted = columns * root[:, None]
    scale = numpy.linalg.norm(weighted, axis=0)
    scale[scale == 0] = 1.0
    return numpy.linalg.lstsq(weighted / scale, root * y, rcond=None)[0] / scale


def _base(name: str, u: numpy.ndarray) -> numpy.ndarray:
    """Return the columns `(..., 1 or 2)` of which r times f is a sum: for a leaky ReLU both of its halves."""
    values = torch.from_numpy(u)
    if name == "leaky_relu":
        return numpy.stack([numpy.maximum(u, 0.0), numpy.minimum(u, 0.0)], axis=-1)
    known = getattr(functional if name in ("relu", "gelu", "silu") else torch, name)
    return known(values).numpy()[..., None]


def _fit_affine(name: str, x: numpy.ndarray, weight: numpy.ndarray, y: numpy.ndarray) -> tuple[float, ...]:
    """Fit p, q, r, s: the grid's best, then least squares over p and q with r and s solved for each."""
    root = numpy.sqrt(weight)
    center = weight @ x
    width = float(numpy.sqrt(weight @ (x - center) ** 2)) or 1.0
    z = (x - center) / width
    ones = numpy.ones_like(x)

    def outer(p: float, q: float) -> tuple[numpy.ndarray, numpy.ndarray]:
        columns = numpy.column_stack([_base(name, p * z + q), ones])
        solution = _solve(columns, root, y)
        return root * (columns @ solution - y), solution

    kinked = name in ("relu", "leaky_relu")  # the scale of their input is that of their output
    scales = (1.0,) if name == "leaky_relu" else (1.0, -1.0) if kinked else SCALES
    shifts = numpy.linspace(-3, 3, 61) if kinked else SHIFTS
    grid = [(p, p * shift) for p in scales for shift in shifts]
    errors = _grid_errors(name, grid, z, weight, y) if name != "leaky_relu" else None
    starts = sorted(
        (float(numpy.sum(outer(*start)[0] ** 2)) if errors is None else errors[index], *start)
        for index, start in enumerate(grid)
    )
    least_squares = needs("scipy.optimize", "functions").least_squares
    best = starts[0]
    for _, p, q in starts[:3]:
        free = (lambda v, p=p: outer(p, v[0])[0]) if kinked else (lambda v: outer(v[0], v[1])[0])
        found = least_squares(
            free, [q] if kinked else [p, q], xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=200
        )
        p, q = (p, *found.x) if kinked else tuple(found.x)
        best = min(best, (float(numpy.sum(outer(p, q)[0] ** 2)), p, q), key=lambda start: start[0])
    _, p, q = best
    *r, s = outer(p, q)[1]
    leak = []
    if name == "leaky_relu":
        if abs(r[0]) < 1e-6 * abs(r[1]):  # its mirror image
            p, q, r = -p, -q, [-r[1], -r[0]]
        leak = [r[1] / (r[0] or 1.0)]
    if name in ("tanh", "sigmoid") and p < 0:  # -tanh(-u) is tanh(u), and 1 - sigmoid(-u) is sigmoid(u)
        p, q, r, s = -p, -q, [-r[0]], s + (r[0] if name == "sigmoid" else 0.0)
    unit = abs(p) / width if kinked else 1.0  # r * f(p * x + q) is r |p| * f(+-x + q / |p|) there
    inner = p / width / unit, (q - p * center / width) / unit
    return tuple(float(value) for value in (*inner, r[0] * unit, s, *leak))


def _grid_errors(
    name: str, grid: Sequence[tuple[float, float]], z: numpy.ndarray, weight: numpy.ndarray, y: numpy.ndarray
) -> list[float]:
    """Return the mean square error of the best r * f(p * z + q) + s for each p, q, all at once."""
    p, q = numpy.array(grid).T[:, :, None]
    f = _base(name, p * z + q)[..., 0]
    f = f - (f @ weight)[:, None]
    centered = y - weight @ y
    variance, covariance = f**2 @ weight, f @ (weight * centered)
    explained = covariance**2 / numpy.where(variance > 0, variance, numpy.inf)
    return (weight @ centered**2 - explained).tolist()


def _fit_rational(
    x: numpy.ndarray, root: numpy.ndarray, y: numpy.ndarray, upper: int, lower: int
) -> tuple[float, ...]:
    """Fit a_0..a_upper and |b_1|..|b_lower|: least squares over the b, with the a solved for each."""
    absolute = numpy.abs(x)[:, None] ** numpy.arange(1, lower + 1)
    powers = x[:, None] ** numpy.arange(upper + 1)
    size = max(float(numpy.sqrt((root**2) @ x**2)), 1e-6)  # of the inputs: b_j is scaled by its power

    def solve(b: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        columns = powers / (1 + absolute @ b)[:, None]
        a = _solve(columns, root, y)
        return root * (columns @ a - y), a

    least_squares = needs("scipy.optimize", "functions").least_squares
    scale = size ** -numpy.arange(1.0, lower + 1)
    results = [
        least_squares(
            lambda b: solve(b * scale)[0],
            numpy.full(lower, start),
            bounds=(0.0, numpy.inf),
            xtol=1e-9,
            ftol=1e-9,
            gtol=1e-9,
            max_nfev=40,
        )
        for start in (0.03, 0.5)
    ]
    b = min(results, key=lambda result: result.cost).x * scale
    b[b * numpy.abs(x).max() ** numpy.arange(1, lower + 1) < 1e-9] = 0.0
    return tuple(float(value) for value in (*solve(b)[1], *b))


@torch.no_grad()
def _module(old: nn.Module, choices: Sequence[Choice]) -> nn.Module:
    """Return the activation with the chosen functions, in the old one's place, dtype and mode."""
    functions = [choice.after if choice.replaced else choice.before for choice in choices]
    if not any(choice.replaced for choice in choices):
        return copy.deepcopy(old)
    if (dim := getattr(old, "dim", -1)) != -1:
        raise ValueError(
            f"{choices[0].before.module} has its channels in dimension {dim}; simplified functions take "
            "them in the last one"
        )
    first = next(old.parameters())
    numerator = old.get_parameter("numerator")
    new = SimplifiedActivation(
        old.hidden_size,  # pyright: ignore[reportArgumentType]
        [function.name for function in functions],
        len(numerator) if len(numerator) > 1 else 1,
        functions[0].init,
    )
    rationals = [function for function in functions if function.name == "rational"]
    values = {
        "numerator": [function.coefficients[:6] for function in rationals],
        "denominator": [function.coefficients[6:] for function in rationals],
        "coefficients": [value for f in functions if f.name != "rational" for value in f.coefficients],
    }
    for name, parameter in new.named_parameters():
        parameter.copy_(torch.tensor(values[name][: len(parameter)], dtype=torch.float64))
        parameter.requires_grad_(first.requires_grad)
    return new.to(first.device, first.dtype).train(old.training)


def _name_in_config(model: nn.Module) -> None:
    """Write the functions of each simplified activation of a FlashKAT into its config."""
    for backbone in model.modules():
        if isinstance(backbone, FlashKATModel):
            acts = {name.removeprefix("layers."): module for name, module in backbone.named_modules()}
            backbone.config.simplified_functions = {
                name.replace(".mlp", ""): list(module.functions)
                for name, module in acts.items()
                if isinstance(module, SimplifiedActivation)
            } or None
