"""Fit gelu, relu and leaky_relu of ``flashkat_hf/model/coefficients.py``; print them and all tables' errors.

    python scripts/fit_start_tables.py           # a few seconds
    python scripts/fit_start_tables.py --check   # exit status 1 where a committed table differs from its fit

For a fixed error t the condition |f Q - P| <= t w Q is linear in (a, b), and b >= 0 costs nothing since r
only sees |b|. The differential correction algorithm makes a sequence of linear programs from that. It needs
no start point, and ends at the global minimum on the grid: no table of this form has a smaller weighted max.

Source: Barrodale, Powell and Roberts, The differential correction algorithm for rational l-infinity
approximation, SIAM J. Numer. Anal. 9 (1972), 493-504.
"""

import argparse
import sys
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from torch.nn import functional

from flashkat_hf.model.coefficients import START_TABLES, StartTable
from flashkat_hf.model.reference import rational_reference

Array = NDArray[np.float64]

TARGETS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "swish": functional.silu,
    "gelu": functional.gelu,  # the exact form, with erf
    "relu": torch.relu,
    "leaky_relu": functional.leaky_relu,  # slope 0.01 below zero
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}

# True: keep r(0) = 0, which raises gelu's error by a sixth. With a kink at 0 the best r is furthest off just
# there, and r(0) = 0 would cost relu a third.
REFITTED = {"gelu": True, "relu": False, "leaky_relu": False}

CORE, REACH, GROWTH = 5.0, 20.0, 6.0  # errors count fully up to |x| = 5, then up to 20 less by (|x| / 5)^6
TOLERANCE = 1e-6  # of max(1, |r|); rounding to ten digits moves r by about 1e-9, another LP solver by less


def grid() -> Array:
    """Points on [-20, 20]; denser towards 0, where the kinks are. Shape ``(num_points,)``."""
    core = CORE * np.linspace(0.0, 1.0, 801) ** 2
    half = np.concatenate([core, np.geomspace(CORE, REACH, 200)[1:]])
    return np.concatenate([-half[:0:-1], half])


def fit(target: Array, x: Array, weight: Array, zero_at_zero: bool) -> StartTable:
    """Fit the table with the smallest max of |r(x) - target| / weight; all arguments ``(num_points,)``."""
    z = x / CORE  # powers of x itself would span twelve decades
    powers, absolute_powers = z[:, None] ** np.arange(6), np.abs(z)[:, None] ** np.arange(5)
    a, b = np.zeros(6), np.eye(5)[0]
    error = np.max(np.abs(target) / weight)
    while True:
        # Minimise d over a (6), b (5, summing to 1; b_0 becomes the 1 of Q at the end) and d, subject to
        # +-(target Q - P) - error weight Q <= d weight (last Q): d < 0 makes every error smaller than before.
        scale = (weight * (absolute_powers @ b))[:, None]
        above = np.hstack([-powers, (target - error * weight)[:, None] * absolute_powers]) / scale
        below = np.hstack([powers, (-target - error * weight)[:, None] * absolute_powers]) / scale
        inequalities = np.hstack([np.vstack([above, below]), np.full((2 * x.size, 1), -1.0)])
        free, zero_to_one = (None, None), (0, 1)
        solution = linprog(
            c=[0] * 11 + [1],
            A_ub=inequalities,
            b_ub=np.zeros(len(inequalities)),
            A_eq=[[0] * 6 + [1] * 5 + [0]],
            b_eq=[1],
            bounds=[(0, 0) if zero_at_zero else free, *[free] * 5, *[zero_to_one] * 5, free],
            method="highs-ds",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        if not solution.success:
            raise RuntimeError(f"linear program failed: {solution.message}")
        new_a, new_b = solution.x[:6], solution.x[6:11]
        new_error = np.max(np.abs(target - (powers @ new_a) / (absolute_powers @ new_b)) / weight)
        if new_error >= error * (1 - 1e-9):
            break
        a, b, error = new_a, new_b, new_error
    numerator = a / b[0] / CORE ** np.arange(6)
    denominator = b[1:] / b[0] / CORE ** np.arange(1, 5)
    return StartTable(_rounded(numerator), _rounded(denominator))


def _rounded(values: Array) -> tuple:
    """Ten significant digits: less than 1e-9 in r."""
    return tuple(float(f"{value:.9e}") + 0.0 for value in values)  # + 0.0 makes -0.0 plain


def fit_all() -> dict[str, StartTable]:
    """Fit the tables of ``REFITTED``, deterministic up to the last digits of the linear programs."""
    x = grid()
    weight = np.maximum(1.0, (np.abs(x) / CORE) ** GROWTH)
    targets = {name: TARGETS[name](torch.from_numpy(x)).numpy() for name in REFITTED}
    return {name: fit(targets[name], x, weight, zero_at_zero) for name, zero_at_zero in REFITTED.items()}


def least_gelu_error() -> float:
    """Max error on [-5, 5] of the table that is best there, tails and r(0) free: what this form allows."""
    x = grid()
    x = x[np.abs(x) <= CORE]
    target = TARGETS["gelu"](torch.from_numpy(x))
    best = fit(target.numpy(), x, np.ones_like(x), zero_at_zero=False)
    return (evaluate(best, torch.from_numpy(x)) - target).abs().max().item()


def evaluate(table: StartTable, x: torch.Tensor) -> torch.Tensor:
    """r(x) in float64; ``x`` is ``(num_points,)``."""
    numerator, denominator = (torch.tensor([row], dtype=torch.float64) for row in table)
    return rational_reference(x[:, None], numerator, denominator)[:, 0]


def differences(committed: Mapping[str, StartTable], fitted: Mapping[str, StartTable]) -> list[str]:
    """List the fitted tables that the committed ones miss by over ``TOLERANCE`` on [-20, 20], in words."""
    x = torch.linspace(-REACH, REACH, 8001, dtype=torch.float64)
    messages = []
    for name, table in fitted.items():
        expected = evaluate(table, x)
        off = ((evaluate(committed[name], x) - expected).abs() / expected.abs().clamp(min=1.0)).max().item()
        if not off <= TOLERANCE:
            messages.append(f"{name}: the committed table is {off:.3g} off its fit, {TOLERANCE:g} is allowed")
    return messages


def report(tables: Mapping[str, StartTable]) -> str:
    """List each table's max errors, slope a5 / |b4| far out, and tail values, the target's in brackets."""
    lines = []
    for name, target in TARGETS.items():
        errors = []
        for reach in (3, 5, 8, 10, 20):
            x = torch.linspace(-reach, reach, 20001, dtype=torch.float64)
            errors.append(f"[-{reach},{reach}] {(evaluate(tables[name], x) - target(x)).abs().max():.2e}")
        x = torch.tensor([10.0, -10.0, 20.0, -20.0, 100.0, -100.0], dtype=torch.float64)
        tails = zip(x.tolist(), evaluate(tables[name], x).tolist(), target(x).tolist(), strict=True)
        values = [f"r({point:g}) = {value:.4g} ({exact:.4g})" for point, value, exact in tails]
        a, b = tables[name]
        slope = a[5] / abs(b[3]) if b[3] else a[1]  # the identity has no fourth power
        lines.append(f"{name}: max error {', '.join(errors)}; slope {slope:.4f}")
        lines.append(f"    {', '.join(values)}")
    return "\n".join(lines)


def main() -> int:
    """Print the tables and the report, or with ``--check`` only what differs; returns the exit status."""
    parser = argparse.ArgumentParser(description="Fit the start tables of the group rational function.")
    parser.add_argument("--check", action="store_true", help="exit 1 where a committed table differs")
    check = parser.parse_args().check
    fitted = fit_all()
    if check:
        messages = differences(START_TABLES, fitted)
        print("\n".join(messages) or "the committed tables are the fitted ones", file=sys.stderr)
        return bool(messages)
    for name, (numerator, denominator) in fitted.items():
        print(f'    "{name}": StartTable(\n        {numerator},\n        {denominator},\n    ),')
    print(report({**START_TABLES, **fitted}))
    print(f"gelu on [-5,5] alone: no table has a smaller max error than {least_gelu_error():.2e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
