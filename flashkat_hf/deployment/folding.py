"""A model that is as few operations as runtimes without a kernel of ours can run.

Coefficients are constants: absolute values are taken once, one for all groups is a number, zeros are left
out, and the leading coefficient goes into the weights behind. The graph has no groups, and so no reshapes.
Linear maps take rows, which is a product with its bias in one operation; query, key and value have a map
each, so that nothing is split; and patches are a convolution, for which each runtime has a kernel.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model.embeddings_flashkat import FlashKATPatchProjection
from ..model.layers import GRKANMlp, GroupRational
from ..model.modeling_flashkat import FlashKATAttention

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

    def columns(self) -> list[Tensor]:
        """Return a_0 to a_5 and |b_1| to |b_4|: `(1,)` if all channels share it, else `(hidden_size,)`."""
        names = [*self.numerator, *self.denominator[1:]]
        values = [0.0 if name is None else getattr(self, name) for name in names]
        return [torch.as_tensor(value, dtype=torch.float32).reshape(-1) for value in values]

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


class FoldedAttention(nn.Module):
    """An attention like `FlashKATAttention` that has a linear map each for query, key and value.

    The scaling is in the query's map.
    """

    def __init__(self, attention: FlashKATAttention):
        super().__init__()
        self.num_heads = attention.num_heads
        weights = attention.qkv.weight.detach().chunk(3)
        biases = [None] * 3 if attention.qkv.bias is None else attention.qkv.bias.detach().chunk(3)
        scales = attention.scaling, 1.0, 1.0
        self.query, self.key, self.value = map(scaled_map, weights, biases, scales)
        self.proj = attention.proj

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        batch, tokens, channels = hidden_states.shape
        rows = hidden_states.reshape(-1, channels)
        heads = batch, tokens, self.num_heads, channels // self.num_heads
        parts = [part(rows).reshape(heads).transpose(1, 2) for part in (self.query, self.key, self.value)]
        mixed = functional.scaled_dot_product_attention(*parts, scale=1.0)
        rows = self.proj(mixed.transpose(1, 2).reshape(-1, channels))
        return rows.reshape(batch, tokens, channels), None


def scaled_map(weight: Tensor, bias: Tensor | None, scale: float) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight.data = (weight * scale).contiguous()
    if bias is not None:
        linear.bias.data = bias * scale
    return linear


class FoldedMlp(nn.Module):
    """What a `GRKANMlp` computes in evaluation, over rows, with folded rationals."""

    def __init__(self, mlp: GRKANMlp):
        super().__init__()
        self.act1, self.fc1, self.act2, self.fc2 = mlp.act1, mlp.fc1, mlp.act2, mlp.fc2
        for name, linear in (("act1", self.fc1), ("act2", self.fc2)):
            act = getattr(self, name)
            if isinstance(act, GroupRational) and act.is_plain:
                new = FoldedRational(act, divides=True)
                if new.scale is not None:
                    linear.weight.data = (linear.weight.double() * new.scale.double()).to(linear.weight.dtype)
                setattr(self, name, new)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.fc1(self.act1(x.reshape(-1, x.shape[-1])))
        return self.fc2(self.act2(rows)).reshape(x.shape)


def convolution(projection: FlashKATPatchProjection) -> nn.Conv2d:
    """Return the convolution that a patch projection is."""
    sizes = projection.in_channels, projection.out_channels, projection.kernel_size, projection.stride
    convolution = nn.Conv2d(*sizes, bias=projection.bias is not None)  # pyright: ignore[reportArgumentType]
    convolution.weight, convolution.bias = projection.weight, projection.bias
    return convolution


FOLDS = {FlashKATAttention: FoldedAttention, GRKANMlp: FoldedMlp, FlashKATPatchProjection: convolution}


def folded(model: nn.Module) -> nn.Module:
    """Return a copy of a model in evaluation mode with folded parts; the same function up to rounding."""
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in FOLDS:
                setattr(module, name, FOLDS[type(child)](child).eval())
    return model


def rationals_of(model: nn.Module) -> dict[str, FoldedRational]:
    """Return the folded rationals of a model by their names."""
    return {name: act for name, act in model.named_modules() if isinstance(act, FoldedRational)}
