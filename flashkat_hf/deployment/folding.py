"""A model whose rationals are as few operations as runtimes without a kernel of ours can run.

Coefficients are constants: absolute values are taken once, one for all groups is a number, zeros are left
out, and the leading coefficient goes into the weights behind. The graph has no groups, and so no reshapes.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..model.layers import GRKANMlp, GroupRational

LEAST = 1e-3  # of the largest coefficient: a smaller leading one is not divided by


class FoldedRational(nn.Module):
    """The function of a `GroupRational`, over the last dimension, over `scale`.

    Args:
        act: whose function this is; later changes of it do not count.
        divides: whether the values are divided by the leading coefficients, which are then `scale`.

    Shape: `(..., hidden_size)` in and out, same dtype; float32 arithmetic.

    Attributes:
        scale: `(hidden_size,)`, or None: what the result must be multiplied by.
    """

    def __init__(self, act: GroupRational, divides: bool = False):
        super().__init__()
        self.hidden_size = act.hidden_size
        self.repeats = act.hidden_size // len(act.denominator)
        numerator = act.numerator.detach().double()
        self.scale: Tensor | None = None
        leading = numerator[:, -1:]
        if divides and (leading.abs() > LEAST * numerator.abs().amax(1, keepdim=True)).all():
            numerator = numerator / leading
            rows = leading.expand(len(act.denominator), 1) if len(leading) == 1 else leading
            self.scale = rows[:, 0].repeat_interleave(self.repeats).float()
        self.numerator = self.constants("a", numerator)
        self.denominator = ["one", *self.constants("b", act.denominator.detach().double().abs())]
        self.one = 1.0

    def constants(self, letter: str, table: Tensor) -> list[str | None]:
        """Set the columns of a table as attributes; return their names, None for zeros."""
        names: list[str | None] = []
        for power, column in enumerate(table.float().unbind(1)):
            name = f"{letter}{power}"
            if (column == column[0]).all():
                setattr(self, name, column[0].item())
            else:
                self.register_buffer(name, column.repeat_interleave(self.repeats))
            names.append(name if column.any() else None)
        return names

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        numerator = self.polynomial(y, self.numerator)
        if not any(self.denominator[1:]):
            return numerator.to(x.dtype)
        return (numerator / self.polynomial(y.abs(), self.denominator)).to(x.dtype)

    def polynomial(self, x: Tensor, names: list[str | None]) -> Tensor:
        """Return c_0 + c_1 x + ... by Horner's rule, with no operation for coefficients of 0 and 1."""
        value: Any = None
        for name in reversed(names):
            coefficient = None if name is None else getattr(self, name)
            if value is None:
                value = coefficient
                continue
            one = isinstance(value, float) and value == 1.0
            value = x if one else value * x
            if coefficient is not None:
                value = value + coefficient
        return value if isinstance(value, Tensor) and value.ndim > 1 else torch.zeros_like(x) + value


def folded(model: nn.Module) -> nn.Module:
    """Return a copy of a model in evaluation mode with folded rationals; the same function up to rounding."""
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        if not isinstance(module, GRKANMlp):
            continue
        for name, linear in (("act1", module.fc1), ("act2", module.fc2)):
            act = getattr(module, name)
            if isinstance(act, GroupRational) and act.is_plain:
                new = FoldedRational(act, divides=True)
                if new.scale is not None:
                    linear.weight.data = (linear.weight.double() * new.scale.double()).to(linear.weight.dtype)
                setattr(module, name, new)
    return model
