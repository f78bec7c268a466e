"""Measure how far a run has moved its rationals, and fit fixed functions to the learned ones."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from flashkat_hf.checkpoints.functions import LearnedFunction, model_functions
from flashkat_hf.model.fitting import fit_rational
from flashkat_hf.model.layers import GroupRational

RANKS = numpy.linspace(0.001, 0.999, 129)  # of the inputs at which one function is fitted to many
DIGITS = 7


def describe(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Return how far each group's function is from its start and from its neighbours, and the tables.

    Distances are root mean squares over the inputs that the images make, in standard deviations of the start
    (or of the groups' mean function): `distance` from the start, `apart` from the mean of the layer's groups.
    `inputs` are quantiles of what all act1, and all act2, meet together.
    """
    functions = model_functions(model, [images])
    layers = {}
    for name, group in groupby(functions, key=lambda function: f"{function.layer}.{function.act}"):
        mine = list(group)
        layers[name] = {
            "distance": [_rounded(_from_start(function)) for function in mine],
            "apart": [_rounded(value) for value in _apart(mine)],
        }
    inputs = {
        act: _quantiles([function for function in functions if function.act == act])
        for act in ("act1", "act2")
    }
    tables = {
        name: [[float(f"{value:.{DIGITS}g}") for value in row] for row in parameter.tolist()]
        for name, parameter in model.named_parameters()
        if name.endswith(("numerator", "denominator"))
    }
    return {"layers": layers, "inputs": inputs, "tables": tables}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _size(values: numpy.ndarray, weight: numpy.ndarray) -> float:
    """Return the root mean square."""
    return float(numpy.sqrt(numpy.average(values**2, weights=weight)))


def _spread(values: numpy.ndarray, weight: numpy.ndarray) -> float:
    return _size(values - numpy.average(values, weights=weight), weight)


def _from_start(function: LearnedFunction) -> float:
    x, weight = function.inputs.x, function.inputs.weight
    start = function.start(x)
    return _size(function(x) - start, weight) / _spread(start, weight)


def _apart(functions: Sequence[LearnedFunction]) -> list[float]:
    x, weight = _pooled(functions)
    values = numpy.stack([function(x) for function in functions])
    mean = values.mean(0)
    return [_size(row - mean, weight) / _spread(mean, weight) for row in values]


def _pooled(functions: Sequence[LearnedFunction]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the inputs of several functions together, ascending, and their weights."""
    x = numpy.concatenate([function.inputs.x for function in functions])
    weight = numpy.concatenate([function.inputs.weight for function in functions])
    order = x.argsort(kind="stable")
    return x[order], weight[order]


def _quantiles(functions: Sequence[LearnedFunction]) -> list[float]:
    x, weight = _pooled(functions)
    below = weight.cumsum() / weight.sum()
    return [_rounded(value) for value in numpy.interp(RANKS, below, x)]


def one_function(rows: Sequence[Mapping[str, Any]], act: str) -> tuple[Tensor, Tensor]:
    """Return numerator `(6,)` and denominator `(4,)` of the one rational that fits an act's learned ones.

    It has the least squared difference to their mean, over layers, groups and runs, at the quantiles of their
    inputs: which is that to all of them together.

    Args:
        rows: results of `describe` of several runs.
        act: "act1" or "act2".
    """
    x = torch.tensor([row["inputs"][act] for row in rows], dtype=torch.float64).mean(0)
    values = []
    for row in rows:
        for name, table in row["tables"].items():
            if name.endswith(f"{act}.denominator"):
                denominator = torch.tensor(table, dtype=torch.float64)
                numerator = torch.tensor(row["tables"][name.replace("denominator", "numerator")]).double()
                layer = GroupRational(len(denominator), len(denominator), len(numerator), dtype=torch.float64)
                layer.load_state_dict({"numerator": numerator, "denominator": denominator})
                values.append(layer(x[:, None].expand(-1, len(denominator))).detach().mean(1))
    numerator, denominator, _ = fit_rational(torch.stack(values).mean(0), x)
    return numerator, denominator


@torch.no_grad()
def install(model: nn.Module, rows: Sequence[Mapping[str, Any]], kind: str, seed: int) -> None:
    """Fill a model's tables with functions that are fitted to learned ones.

    Args:
        model: a FlashKAT as it starts.
        rows: results of `describe` by ascending seed, with that seed.
        kind: "own": those of the run with the next seed, group by group; "one": `one_function` of all runs.
        seed: of the model.
    """
    parameters = dict(model.named_parameters())
    if kind == "own":
        row = next((each for each in rows if each["seed"] > seed), rows[0])
        for name, table in row["tables"].items():
            parameters[name].copy_(torch.tensor(table))
        return
    for act in ("act1", "act2"):
        numerator, denominator = one_function(rows, act)
        for name, parameter in parameters.items():
            if name.endswith(f"{act}.numerator"):
                parameter.copy_(numerator)
            if name.endswith(f"{act}.denominator"):
                parameter.copy_(denominator)
