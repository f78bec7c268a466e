"""Means with standard errors, differences paired by seed, and the smallest difference that could be seen.

The tests are scipy's and statsmodels'; nothing is computed here that these have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from flashkat_hf.messages import needs

LEVEL, POWER = 0.05, 0.8  # of the tests: chance to see what is not there, and to see what is


@dataclass(frozen=True)
class Summary:
    """Accuracies of one contender over seeds; the error is the standard error of the mean."""

    count: int
    mean: float
    error: float | None  # None for a single seed


@dataclass(frozen=True)
class Difference:
    """The mean difference of two contenders, paired by seed.

    Attributes:
        count: seeds that both have.
        mean: of the first minus the second.
        error: its standard error.
        spread: standard deviation of the differences.
        p: of the paired t test, without a correction.
    """

    count: int
    mean: float
    error: float
    spread: float
    p: float

    def detectable(self, tests: int) -> float:
        """Return the smallest true difference that is seen four times in five, at LEVEL / tests."""
        return detectable(self.count, self.spread, tests)


def library(name: str) -> Any:
    """Import a library that only the tables need.

    Raises:
        SystemExit: it is not installed; the message says how.
    """
    try:
        return needs(name, "dev")
    except ValueError as error:
        raise SystemExit(str(error)) from error


def detectable(count: int, spread: float, tests: int) -> float:
    """Return the smallest difference that a paired t test sees with probability POWER.

    Args:
        count: pairs.
        spread: standard deviation of the differences.
        tests: comparisons that share LEVEL; Holm's first step, the hardest.
    """
    power = library("statsmodels.stats.power")
    effect = power.TTestPower().solve_power(nobs=count, alpha=LEVEL / tests, power=POWER)
    return float(effect) * spread


def by_seed(rows: Sequence[Mapping]) -> dict[int, float]:
    return {row["seed"]: row["accuracy"] for row in rows}


def summary(values: Mapping[int, float]) -> Summary:
    stats = library("scipy.stats")
    numbers = list(values.values())
    return Summary(len(numbers), mean(numbers), float(stats.sem(numbers)) if len(numbers) > 1 else None)


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Return the difference over the seeds that both have, or None for less than two."""
    stats = library("scipy.stats")
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2:
        return None
    gaps = [first[seed] - second[seed] for seed in seeds]
    spread = stdev(gaps)
    if spread == 0:  # no test: the same in every seed
        return Difference(len(seeds), mean(gaps), 0.0, 0.0, 1.0 if not any(gaps) else 0.0)
    test = stats.ttest_1samp(gaps, 0.0)  # which is the paired test
    return Difference(len(seeds), mean(gaps), float(stats.sem(gaps)), spread, float(test.pvalue))


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's method."""
    if not values:
        return []
    multitest = library("statsmodels.stats.multitest")
    return [float(value) for value in multitest.multipletests(values, method="holm")[1]]
