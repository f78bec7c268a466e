"""Layers for `kernels.kernelize`: they have no state, and use the parameters of the module they replace."""

from torch import Tensor, nn

from .op_rational import rational


class GroupRational(nn.Module):
    """A layer for modules with `numerator` `(num_groups or 1, 6)` and `denominator` `(num_groups, 4)`."""

    can_torch_compile = True
    has_backward = True
    numerator: Tensor
    denominator: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return rational(x, self.numerator, self.denominator)
