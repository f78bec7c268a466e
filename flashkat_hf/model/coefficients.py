"""Named start tables of the group rational function, its second moments, and the simpler functions beside it.

    r(x) = (a_0 + a_1 x + ... + a_5 x^5) / (1 + |b_1||x| + |b_2||x|^2 + |b_3||x|^3 + |b_4||x|^4)

The tables hold for this Q alone, each term made positive; 1 + |b_1 x + ... + b_4 x^4| is another function.

Largest errors against the function of the same name, and the tails, where r(x) ~ slope * x at both ends:

    table         [-3, 3]  [-5, 5]  [-8, 8]   slope  r(20)  r(-20)  r(100)  r(-100)
    identity            0        0        0       1     20     -20     100     -100
    swish, silu    1.2e-6   1.8e-3   4.9e-2    0.50   17.8   -2.19    60.4    -39.6
    gelu           3.5e-3   3.5e-3   5.4e-2    0.50   19.0   -0.98    62.9    -37.1  refit, exact (erf) gelu
    relu           2.4e-2   2.4e-2   3.8e-1    0.50   14.9   -5.06    55.3    -44.7  refit
    leaky_relu     2.4e-2   2.4e-2   3.8e-1    0.51   15.0   -5.21    55.7    -45.3  refit, 0.01 x below zero
    tanh           4.1e-5   4.9e-3   1.9e-2    0.04   1.13   -1.13    4.01    -4.01
    sigmoid        1.9e-5   3.9e-3   3.3e-2    0.04   1.34   -0.34    4.20    -3.20

The released gelu was fitted to that other function and is wrong by 1.5 on [-3, 3]; the released relu and
leaky_relu are wrong by 0.36 on [-5, 5]. Each refit has the smallest possible max over [-20, 20] of
|error| / max(1, (|x| / 5)^6): accurate up to 5, with tails that grow at most like x. gelu keeps r(0) = 0, for
a sixth more error; relu and leaky_relu have r(0) = 0.024, since the best r is furthest off at the kink.
On [-5, 5] alone no table of this form brings gelu below 2.4e-3.

Source: identity, swish, tanh and sigmoid are the released ones to the last digit, from init.json of Yang and
Wang, Kolmogorov-Arnold Transformer, ICLR 2025 (MIT licence); the others come from our
``scripts/fit_start_tables.py``.
"""

import math
from functools import lru_cache
from typing import NamedTuple


class StartTable(NamedTuple):
    """One row of each coefficient tensor, lowest power first."""

    numerator: tuple[float, float, float, float, float, float]  # a_0..a_5
    denominator: tuple[float, float, float, float]  # b_1..b_4; signs are ignored


START_TABLES: dict[str, StartTable] = {
    "identity": StartTable((0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
    "swish": StartTable(
        (
            3.054879741161051e-07,
            0.5000007853744493,
            0.24999783422824703,
            0.05326628273219478,
            0.005803034571292244,
            0.0002751961022402342,
        ),
        (-4.111554955950634e-06, 0.10652899335007572, -1.2690007399796238e-06, 0.0005502331264140556),
    ),
    "gelu": StartTable(
        (0.0, 0.5, 0.4127061528, 0.1190906438, 0.01390238938, 0.0005269603875),
        (0.0, 0.2381812875, 0.0, 0.001053920775),
    ),
    "relu": StartTable(
        (0.02432084452, 0.5, 1.464240828, 1.249643142, 0.3733443056, 0.03506042402),
        (0.0, 2.499286284, 0.0, 0.07012084803),
    ),
    "leaky_relu": StartTable(
        (0.02407763607, 0.505, 1.44959842, 1.262139574, 0.3696108625, 0.03541102826),
        (0.0, 2.499286284, 0.0, 0.07012084803),
    ),
    "tanh": StartTable(
        (
            -1.0804622559204184e-08,
            1.0003008043819048,
            -2.5878199375289335e-08,
            0.09632129918392647,
            3.4775841628196104e-09,
            0.0004255709234726337,
        ),
        (-0.0013027181209176277, 0.428349017422072, 1.4524304083061898e-09, 0.010796648111337176),
    ),
    "sigmoid": StartTable(
        (
            0.4999992534599381,
            0.25002157564685185,
            0.14061924500301096,
            0.049420492431596394,
            0.00876714851885483,
            0.0006442412789159799,
        ),
        (2.1694506382753683e-09, 0.28122766100417684, 1.0123620714203357e-05, 0.017531988049946),
    ),
}
START_TABLES["silu"] = START_TABLES["swish"]  # two names of one function


def start_table(name: str) -> StartTable:
    """Return the start table of that name.

    Raises:
        ValueError: there is none; the message lists the known names.
    """
    try:
        return START_TABLES[name]
    except KeyError:
        known = ", ".join(START_TABLES)
        raise ValueError(f"unknown start table {name!r}; known are {known}") from None


AFFINE = (1.0, 0.0, 1.0, 0.0)  # p, q, r, s of r * f(p * x + q) + s
SIMPLE_FUNCTIONS: dict[str, tuple[float, ...]] = {  # what may stand for a rational: its start
    "zero": (),
    "identity": (),
    "linear": (0.0, 1.0),  # polynomials: constant term first
    "relu": AFFINE,
    "leaky_relu": (*AFFINE, 0.01),  # and the slope of f below zero
    "gelu": AFFINE,
    "silu": AFFINE,
    "tanh": AFFINE,
    "sigmoid": AFFINE,
    "polynomial_2": (0.0, 1.0, 0.0),
    "polynomial_3": (0.0, 1.0, 0.0, 0.0),
    "rational_1_1": (0.0, 1.0, 0.0),  # rational_m_n: a_0..a_m, then b_1..b_n
    "rational_2_1": (0.0, 1.0, 0.0, 0.0),
    "rational_2_2": (0.0, 1.0, 0.0, 0.0, 0.0),
    "rational_3_2": (0.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    "rational_3_3": (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "rational_4_3": (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
}
WITH_AFFINE_MAPS = ("relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid")


def degrees(name: str) -> tuple[int, int]:
    """Return the degrees of numerator and denominator of a polynomial or a rational in SIMPLE_FUNCTIONS."""
    if name.startswith("rational_"):
        numerator, denominator = name.split("_")[1:]
        return int(numerator), int(denominator)
    return len(SIMPLE_FUNCTIONS[name]) - 1, 0


@lru_cache
def second_moment(name: str) -> float:
    """Return E[r(z)^2] for z ~ N(0, 1) of the table of that name, accurate to 1e-6.

    Its reciprocal is the gain alpha of the variance-preserving initialisation: a linear map behind r starts
    with Var(w) = alpha / d_in, alpha = Var[x] / E[r(x)^2]. Source: Yang and Wang, ICLR 2025, as above.

    Raises:
        ValueError: there is no such table.
    """
    a, b = start_table(name)
    step, total = 0.01, 0.0
    for index in range(-1000, 1001):  # trapezoid rule on [-10, 10]; the density at its ends is below 1e-22
        x = index * step
        p = sum(value * x**k for k, value in enumerate(a))
        q = 1.0 + sum(abs(value) * abs(x) ** k for k, value in enumerate(b, start=1))
        total += (p / q) ** 2 * math.exp(-x * x / 2)
    return total * step / math.sqrt(2 * math.pi)
