"""Table 1: parameters and operations of an MLP, a KAN and a GR-KAN layer, by formulas and on real layers."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flashkat_hf import GroupRational

from .published import ACTIVATION, DENOMINATOR, FORMULAS, GRID, GROUPS, MODELS, NUMERATOR, ORDER


def formula(layer: str, channels: int, out_channels: int) -> tuple[int, int]:
    """Return parameters, and operations for one token."""
    edges = channels * out_channels
    if layer == "MLP":
        return edges + out_channels, 2 * edges + ACTIVATION * out_channels
    if layer == "KAN":
        spline = 9 * ORDER * (GRID + 1.5 * ORDER) + 2 * GRID - 2.5 * ORDER + 3
        return edges * (GRID + ORDER + 3) + out_channels, int(edges * spline) + ACTIVATION * channels
    coefficients = NUMERATOR + 1 + DENOMINATOR * GROUPS
    return edges + out_channels + coefficients, 2 * edges + (2 * NUMERATOR + 2 * DENOMINATOR + 3) * channels


class SplineLayer(nn.Module):
    """A KAN layer: on each edge a B-spline of its own, a SiLU, and their two scales and a mask.

    y_o = bias_o + sum over i of mask (base silu(x_i) + scale sum_k coefficient_k B_k(x_i))
    """

    def __init__(self, channels: int, out_channels: int, grid: int = GRID, order: int = ORDER):
        super().__init__()
        self.order = order
        step = 2 / grid
        self.register_buffer("knots", torch.arange(-order, grid + order + 1) * step - 1)  # [-1, 1] and beyond
        shape = out_channels, channels
        self.coefficient = nn.Parameter(0.1 * torch.randn(*shape, grid + order))
        self.base = nn.Parameter(torch.randn(shape) / channels**0.5)
        self.scale = nn.Parameter(torch.ones(shape))
        self.mask = nn.Parameter(torch.ones(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def splines(self, x: Tensor) -> Tensor:
        """Return the B-splines' values `(..., channels, grid + order)`, by de Boor's recursion."""
        x, knots = x.unsqueeze(-1), self.knots
        values = ((x >= knots[:-1]) & (x < knots[1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            rising = (x - knots[: -k - 1]) / (knots[k:-1] - knots[: -k - 1])
            falling = (knots[k + 1 :] - x) / (knots[k + 1 :] - knots[1:-k])
            values = rising * values[..., :-1] + falling * values[..., 1:]
        return values

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.coefficient * (self.scale * self.mask).unsqueeze(-1)).flatten(1)
        curved = nn.functional.linear(self.splines(x).flatten(-2), weight, self.bias)
        return curved + nn.functional.linear(nn.functional.silu(x), self.base * self.mask)


def layer(name: str, channels: int, out_channels: int) -> nn.Module:
    if name == "MLP":
        return nn.Sequential(nn.Linear(channels, out_channels), nn.GELU())
    if name == "KAN":
        return SplineLayer(channels, out_channels)
    return nn.Sequential(GroupRational(channels, GROUPS), nn.Linear(channels, out_channels))


def counted(module: nn.Module, channels: int) -> tuple[int, int]:
    """Count parameters, and operations of matrix products for one token, all that PyTorch's counter sees."""
    tokens = 2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.randn(1, tokens, channels))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return parameters, counter.get_total_flops() // tokens


def products(name: str, channels: int, out_channels: int) -> int:
    """Return the operations for one token that our layers make in matrix products."""
    edges = 2 * channels * out_channels
    return edges * (GRID + ORDER + 1) if name == "KAN" else edges


def measure(toy: bool = False) -> list[dict]:
    """Return a result for each size and layer: the first layer of a block's MLP."""
    sizes = {"toy": {"hidden": 16, "mlp": 64}} if toy else MODELS
    results = []
    for size, model in sizes.items():
        channels, out_channels = model["hidden"], model["mlp"]
        for name in FORMULAS:
            parameters, operations = formula(name, channels, out_channels)
            counts = counted(layer(name, channels, out_channels), channels)
            results.append(
                {
                    "what": "layer",
                    "size": size,
                    "layer": name,
                    "channels": [channels, out_channels],
                    "parameters": parameters,
                    "operations": operations,
                    "parameters_counted": counts[0],
                    "products_expected": products(name, channels, out_channels),
                    "products_counted": counts[1],
                }
            )
    return results
