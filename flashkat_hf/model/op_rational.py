"""The operator `rational`: it checks its arguments, and calls the kernel or the formula."""

import torch
from torch import Tensor

from .native_rational import gradients as native_gradients
from .native_rational import value as native_value
from .operators import by_device, by_formula, decomposes, differentiable, is_traced, register
from .reference import rational_decomposed

try:
    from .triton_rational import rational_backward, rational_forward
except ImportError:  # no triton: the plain path serves every device
    rational_forward = rational_backward = None


def rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Apply one learned rational function to each group of channels.

        y = (a_0 + a_1 x + ... + a_5 x^5) / (1 + |b_1||x| + |b_2||x|^2 + |b_3||x|^3 + |b_4||x|^4)

    Args:
        x: `(..., hidden_size)`; float32, bfloat16, float16 or float64, any strides.
        numerator: `(num_groups, 6)`, constant term first; `(1, 6)` serves all groups.
        denominator: `(num_groups, 4)`, linear term first, signs are ignored; `(1, 4)` serves all groups.

    Returns:
        Same shape, dtype and device as `x`, under autocast too. Float32 arithmetic (float64 for float64),
        rounded once. Gradients are closed-form, with the sign of zero taken as +1, and the same from run to
        run, bit for bit. Float32 holds |a_5||x|^5 and |b_4||x|^4 up to 3.4e38: with the start tables the
        value is on its asymptote up to |x| = 5e7, and inf or NaN beyond 1e8 (the identity aside).

    Raises:
        ValueError: `x` is not of a real floating dtype or has no channels, a table has another shape,
            `hidden_size` is not a multiple of `num_groups`, or the tensors are on different devices.

    Source: Yang and Wang, Kolmogorov-Arnold Transformer, ICLR 2025, with |b_j| taken term by term.
    """
    check_arguments(x, numerator, denominator)
    if decomposes(x):
        return rational_decomposed(x, numerator, denominator)
    return rational_operator(x.contiguous(), numerator.contiguous(), denominator.contiguous())


def check_arguments(x: Tensor, numerator: Tensor, denominator: Tensor) -> None:
    """Refuse what no rational operator takes; arguments as in `rational`.

    Raises:
        ValueError: as in `rational`.
    """
    for name, tensor in (("x", x), ("numerator", numerator), ("denominator", denominator)):
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, not {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(
                f"x is on {x.device} but {name} is on {tensor.device}; they must be on one device"
            )
    for name, table, columns in (("numerator", numerator, 6), ("denominator", denominator, 4)):
        if table.ndim != 2 or table.shape[1] != columns or table.shape[0] == 0:
            raise ValueError(
                f"{name} must have shape (num_groups, {columns}) or (1, {columns}), not {tuple(table.shape)}"
            )
    num_groups = max(numerator.shape[0], denominator.shape[0])
    if min(numerator.shape[0], denominator.shape[0]) not in (1, num_groups):
        raise ValueError(
            f"numerator has {numerator.shape[0]} rows and denominator {denominator.shape[0]}; "
            "they must agree or be 1"
        )
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have at least one dimension and one channel, not shape {tuple(x.shape)}")
    if x.shape[-1] % num_groups:
        raise ValueError(f"hidden_size ({x.shape[-1]}) must be a multiple of num_groups ({num_groups})")


def _shape_of_y(x, numerator, denominator):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _shapes_of_gradients(grad_y, x, numerator, denominator):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, torch.empty_like(numerator), torch.empty_like(denominator)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, backward, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad_y.contiguous(), *ctx.saved_tensors)


def _formula_gradients(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return by_formula(rational_decomposed, ctx.saved_tensors, grad_y)


cpu_operator = register("rational_cpu", native_value, _shape_of_y)


def _plain_value(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Compute the rational without a Triton kernel; on a CPU one node of what traces, as backward is."""
    function = cpu_operator if x.device.type == "cpu" and is_traced(x) else native_value
    return function(x, numerator, denominator)


value = by_device(_plain_value, rational_forward)
gradients = by_device(native_gradients, rational_backward)
rational_operator = differentiable(
    "rational", (value, _shape_of_y), (gradients, _shapes_of_gradients), _save, _gradients, _formula_gradients
)
