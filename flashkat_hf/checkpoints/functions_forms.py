"""The two forms that a learned function has, with what can be said of each exactly.

A `Quotient` is a rational or a polynomial, an `Affine` another function between two affine maps. Both have
the same methods; all arithmetic is in float64.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from ..model.layers import affine_function
from ..model.reference import rational_gradients, rational_value

ENDS = {  # f(u) ~ slope * u + intercept for u to minus and to plus infinity
    "relu": ((0.0, 0.0), (1.0, 0.0)),
    "gelu": ((0.0, 0.0), (1.0, 0.0)),
    "silu": ((0.0, 0.0), (1.0, 0.0)),
    "tanh": ((0.0, -1.0), (0.0, 1.0)),
    "sigmoid": ((0.0, 0.0), (0.0, 1.0)),
}
MINIMUM = {"gelu": -0.7517915246935645, "silu": -1.2784645427610738}  # where f'(u) = 0; the others have none
STEEPEST = {"gelu": 2**0.5, "silu": 2.3993572805154674, "tanh": 0.0, "sigmoid": 0.0}  # |f'| largest at +- u


class Asymptote(NamedTuple):
    """The straight line `slope * x + intercept`."""

    slope: float
    intercept: float


class Quotient:
    """P(x) / Q(x) with P(x) = a_0 + ... + a_5 x^5 and Q(x) = 1 + |b_1||x| + ... + |b_4||x|^4."""

    def __init__(self, numerator: tuple[float, ...], denominator: tuple[float, ...]):
        self.numerator = numerator
        self.denominator = denominator

    def _tables(self) -> tuple[Tensor, Tensor]:
        numerator, denominator = (
            torch.tensor([row], dtype=torch.float64) for row in (self.numerator, self.denominator)
        )
        return numerator, denominator

    def value(self, x: Tensor) -> Tensor:
        """Compute the function of a float64 vector."""
        return rational_value(x[:, None], *self._tables()).squeeze(1)

    def slope(self, x: Tensor) -> Tensor:
        """Compute the derivative at a float64 vector."""
        return rational_gradients(torch.ones_like(x)[:, None], x[:, None], *self._tables())[0].squeeze(1)

    def asymptotes(self) -> tuple[Asymptote | None, Asymptote | None]:
        """Return the lines that it approaches to the left and the right; None where it grows faster."""
        left, right = (_line(*side) for side in self._sides())
        return left, right

    def zeros(self) -> tuple[float, ...]:
        """Return where the function is 0, ascending; empty for the zero function itself."""
        numerator = Polynomial(self.numerator).trim()
        return tuple(sorted({_polished(numerator, x) for x in _real_roots(numerator)}))

    def turns(self) -> list[float]:
        """Return where it may have a minimum or a maximum, at 0 too: |x| can make a kink there."""
        left, right = (_real_roots(_slope_numerator(*side)) for side in self._sides())
        return [*(x for x in left if x < 0), *(x for x in right if x > 0), 0.0]

    def steepest(self) -> list[float]:
        """Return where |slope| may be largest; it may differ on both sides of 0."""
        places = [-1e-300, 0.0]
        for side in self._sides():
            first, (_, denominator) = _slope_numerator(*side), side
            places += _real_roots(first.deriv() * denominator - 2 * first * denominator.deriv())
        return places

    def sympy(self, sympy: Any, x: Any) -> Any:
        """Return the formula as an expression of sympy, of its symbol `x`."""
        above = sum((_number(sympy, a) * x**k for k, a in enumerate(self.numerator) if a), sympy.S.Zero)
        terms = (_number(sympy, b) * abs(x) ** k for k, b in enumerate(self.denominator, 1) if b)
        return above / sum(terms, sympy.S.One)

    def _sides(self) -> list[tuple[Polynomial, Polynomial]]:
        """Return numerator and denominator as polynomials in x, for x <= 0 and for x >= 0."""
        numerator = Polynomial(self.numerator).trim()
        denominators = [[1.0, *(b * sign**k for k, b in enumerate(self.denominator, 1))] for sign in (-1, 1)]
        return [(numerator, Polynomial(denominator).trim()) for denominator in denominators]


class Affine:
    """r * f(p * x + q) + s with a known f; a leaky ReLU has its slope below zero behind the four."""

    def __init__(self, name: str, coefficients: tuple[float, ...]):
        self.name = name
        self.coefficients = coefficients
        self.p, self.q, self.r, self.s, *self.leak = coefficients

    def value(self, x: Tensor) -> Tensor:
        """Compute the function of a float64 vector."""
        return affine_function(self.name, x, torch.tensor(self.coefficients, dtype=torch.float64))

    def slope(self, x: Tensor) -> Tensor:
        """Compute the derivative at a float64 vector."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.value(x).sum(), x)[0]

    def asymptotes(self) -> tuple[Asymptote | None, Asymptote | None]:
        """Return the lines that it approaches to the left and the right."""
        p, q, r, s = self.p, self.q, self.r, self.s
        if p == 0:
            return Asymptote(0.0, self._at(q)), Asymptote(0.0, self._at(q))
        ends = ENDS.get(self.name) or ((self.leak[0], 0.0), (1.0, 0.0))
        lines = [Asymptote(r * slope * p, r * (slope * q + intercept) + s) for slope, intercept in ends]
        return (lines[0], lines[1]) if p > 0 else (lines[1], lines[0])

    def zeros(self) -> tuple[float, ...]:
        """Return where the function is 0, ascending; empty for a constant."""
        return tuple(sorted((u - self.q) / self.p for u in self._crossings()))

    def turns(self) -> list[float]:
        """Return where it has a minimum or a maximum."""
        kink = self.name == "leaky_relu" and self.leak[0] < 0
        at = 0.0 if kink else MINIMUM.get(self.name)
        return [(at - self.q) / self.p] if at is not None and self.p else []

    def steepest(self) -> list[float]:
        """Return where |slope| is largest."""
        at = STEEPEST.get(self.name)
        return [(u - self.q) / self.p for u in (at, -at)] if at is not None and self.p else []

    def sympy(self, sympy: Any, x: Any) -> Any:
        """Return the formula as an expression of sympy, of its symbol `x`."""
        p, q, r, s, *leak = (_number(sympy, value) for value in self.coefficients)
        u = p * x + q
        known = {
            "relu": lambda: sympy.Max(0, u),
            "leaky_relu": lambda: sympy.Piecewise((leak[0] * u, u < 0), (u, True)),
            "gelu": lambda: u * (1 + sympy.erf(u / sympy.sqrt(2))) / 2,
            "silu": lambda: u / (1 + sympy.exp(-u)),
            "tanh": lambda: sympy.tanh(u),
            "sigmoid": lambda: 1 / (1 + sympy.exp(-u)),
        }
        return r * known[self.name]() + s

    def _at(self, u: float) -> float:
        """Return r * f(u) + s."""
        coefficients = torch.tensor([1.0, 0.0, self.r, self.s, *self.leak], dtype=torch.float64)
        return affine_function(self.name, torch.tensor([u], dtype=torch.float64), coefficients).item()

    def _crossings(self) -> Iterator[float]:
        """Yield each u with r * f(u) + s = 0, by bisection on the pieces where f rises or falls."""
        if self.p == 0 or self.r == 0:
            return
        turn = MINIMUM.get(self.name, 0.0)
        far = 64.0 + abs(self.s / self.r) / (abs(self.leak[0] or 1) if self.leak else 1)
        for low, high in ((-far, turn), (turn, far)):
            first = self._at(low)
            if first * self._at(high) < 0:
                for _ in range(200):
                    middle = (low + high) / 2
                    low, high = (middle, high) if self._at(middle) * first > 0 else (low, middle)
                yield (low + high) / 2
        if self._at(turn) == 0 and self.name != "relu":
            yield turn


def _number(sympy: Any, value: float) -> Any:
    return sympy.Float(repr(value), 17)


def _real_roots(polynomial: Polynomial) -> list[float]:
    """Return the real roots; a pair that rounding has moved off the line counts once."""
    trimmed = polynomial.trim()
    if trimmed.degree() < 1:
        return []
    roots = trimmed.roots()
    return sorted({float(root.real) for root in roots if abs(root.imag) <= 1e-7 * (1 + abs(root))})


def _polished(polynomial: Polynomial, x: float) -> float:
    """Return a root after two of Newton's steps, where they help."""
    for _ in range(2):
        slope = polynomial.deriv()(x)
        new = x - polynomial(x) / slope if slope else x
        x = float(new) if abs(polynomial(new)) < abs(polynomial(x)) else x
    return x


def _slope_numerator(numerator: Polynomial, denominator: Polynomial) -> Polynomial:
    """Return P'Q - PQ', which has the sign of the slope of P / Q."""
    return numerator.deriv() * denominator - numerator * denominator.deriv()


def _line(numerator: Polynomial, denominator: Polynomial) -> Asymptote | None:
    """Return the line that P / Q approaches far out, or None if it grows faster."""
    if numerator.degree() > denominator.degree() + 1:
        return None
    quotient = (numerator // denominator).coef
    return Asymptote(float(quotient[1]) if len(quotient) > 1 else 0.0, float(quotient[0]))
