"""Layers for `kernels.kernelize`.

Stateless, they work on the parameters of the module that they stand for.
"""

from torch import Tensor, nn

from .op_rational import rational


class GroupRational(nn.Module):
    """For modules with `numerator` `(num_groups or 1, 6)` and `denominator` `(num_groups, 4)`, as flashkat_hf's."""

    can_torch_compile = True
    has_backward = True
    numerator: Tensor
    denominator: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return rational(x, self.numerator, self.denominator)
