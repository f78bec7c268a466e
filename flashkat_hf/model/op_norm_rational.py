"""The operators `add_norm_rational`, a residual addition with layer norm and rational, and `norm_beside`."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from .op_rational import check_arguments
from .operators import NO_SECOND_DERIVATIVES, by_device, by_formula, decomposes, differentiable, needs_formula
from .reference import (
    add_norm_rational_gradients,
    add_norm_rational_value,
    norm_gradients,
    norm_value,
    rational_decomposed,
)

try:
    from .triton_norm import norm_backward, norm_forward
    from .triton_norm_rational import add_norm_rational_backward, add_norm_rational_forward
except ImportError:  # no triton: the plain path serves every device
    add_norm_rational_forward, add_norm_rational_backward = (
        add_norm_rational_value,
        add_norm_rational_gradients,
    )
    norm_forward, norm_backward = norm_value, norm_gradients


def add_norm_rational(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    eps: float,
    branch_bias: Tensor | None = None,
    later_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `total = residual + branch` and `rational(layer_norm(total))` in one pass over memory.

    Args:
        residual: `(..., hidden_size)`; float32, bfloat16, float16 or float64, any strides.
        branch: of residual's shape; another dtype is allowed.
        weight: `(hidden_size,)`, of the layer norm.
        bias: `(hidden_size,)`, of the layer norm.
        numerator: as in `rational`.
        denominator: as in `rational`.
        eps: added to the variance.
        branch_bias: `(hidden_size,)`, any dtype; branch already contains it, by an addition that did not
            record its gradient, which is made here.
        later_bias: likewise contained in what is added to `total`, which goes nowhere else. Both or none of
            the two.

    Returns:
        `total` in residual's dtype and the activation in branch's. Float32 arithmetic; the norm sees the
        rounded total. One backward gives all gradients.

    Raises:
        ValueError: as in `rational`, or shapes that differ.
    """
    check_arguments(residual, numerator, denominator)
    if branch.shape != residual.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)} but branch {tuple(branch.shape)}")
    if (branch_bias is None) != (later_bias is None):
        raise ValueError("branch_bias and later_bias go together")
    vectors = [vector for vector in (weight, bias, branch_bias, later_bias) if vector is not None]
    if {vector.shape for vector in vectors} != {residual.shape[-1:]}:
        shapes = ", ".join(str(tuple(vector.shape)) for vector in vectors)
        raise ValueError(f"weight and biases must have shape {tuple(residual.shape[-1:])}, not {shapes}")
    if decomposes(residual):
        if branch_bias is not None:
            branch = branch + _gradient_alone(branch_bias, branch.dtype)
        total = (residual + branch).to(residual.dtype)
        y = _norm_rational(total, weight, bias, numerator, denominator, eps, branch.dtype)
        if later_bias is not None:
            total = total + _gradient_alone(later_bias, total.dtype)
        return total, y
    summands = residual.contiguous(), branch.contiguous()
    tables = numerator.contiguous(), denominator.contiguous()
    return add_norm_rational_operator(*summands, weight, bias, *tables, eps, branch_bias, later_bias)


def norm_beside(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a residual stream and its layer norm in `dtype`, in one pass; one backward joins both gradients.

    For eager mode; `torch.compile` fuses what is around a norm itself.

    Args:
        x: `(..., hidden_size)`, contiguous; float32, bfloat16, float16 or float64.
        weight: `(hidden_size,)`, of the layer norm.
        bias: `(hidden_size,)`, of the layer norm.
        eps: added to the variance.
        dtype: of the norm.

    Returns:
        `x` itself, to go on with, and its norm. Float32 arithmetic, float64 for float64.

    Raises:
        ValueError: shapes that differ.
    """
    if not weight.shape == bias.shape == x.shape[-1:]:
        shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        raise ValueError(f"weight and bias must have shape {tuple(x.shape[-1:])}, not {shapes}")
    return _NormBeside.apply(x, weight, bias, eps, dtype)  # pyright: ignore[reportReturnType]


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(dtype)


def _norm_rational(total, weight, bias, numerator, denominator, eps: float, dtype: torch.dtype) -> Tensor:
    x = _norm(total, weight, bias, eps, weight.dtype)
    return rational_decomposed(x, numerator, denominator).to(dtype)


def _gradient_alone(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0, with the gradient of a bias whose addition did not record it."""
    return (bias - bias.detach()).to(dtype)


def _forward(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    eps: float,
    branch_bias: Tensor | None,
    later_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _value(residual, branch, weight, bias, numerator, denominator, eps)


def _shapes_of_results(residual, branch, *parameters):
    dtype = torch.promote_types(residual.dtype, torch.float32)
    mean, rstd = (residual.new_empty(residual.shape[:-1], dtype=dtype) for _ in range(2))
    return torch.empty_like(residual), torch.empty_like(branch), mean, rstd


def _shapes_of_gradients(grad_total, grad_y, total, mean, rstd, weight, bias, numerator, denominator, totals):
    columns = mean.new_empty(4 if totals else 2, total.shape[-1])
    return torch.empty_like(total), columns, torch.empty_like(numerator), torch.empty_like(denominator)


def _save(ctx, inputs, output) -> None:
    _, branch, *parameters, ctx.eps, branch_bias, later_bias = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(total, mean, rstd, *parameters)
    ctx.branch_dtype = branch.dtype
    ctx.vector_dtypes = [
        vector.dtype for vector in (*parameters[:2], branch_bias, later_bias) if vector is not None
    ]
    ctx.mark_non_differentiable(mean, rstd)


def _gradients(ctx, backward, grad_total: Tensor, grad_y: Tensor, *_) -> tuple:
    dtypes = ctx.vector_dtypes
    grad, columns, *grad_tables = backward(
        grad_total.contiguous(), grad_y.contiguous(), *ctx.saved_tensors, len(dtypes) == 4
    )
    vectors = [column.to(dtype) for column, dtype in zip(columns, dtypes, strict=True)]
    grad_weight, grad_bias, *grad_biases = vectors
    norm = grad_weight, grad_bias
    return grad, grad.to(ctx.branch_dtype), *norm, *grad_tables, None, *(grad_biases or (None, None))


def _formula_gradients(ctx, grad_total: Tensor, grad_y: Tensor) -> tuple:
    if len(ctx.vector_dtypes) == 4:  # total now goes elsewhere, too: into what is differentiated next
        raise RuntimeError(NO_SECOND_DERIVATIVES)
    total, _, _, weight, bias, numerator, denominator = ctx.saved_tensors
    formula = partial(_norm_rational, eps=ctx.eps, dtype=ctx.branch_dtype)
    grad, *grads = by_formula(formula, (total, weight, bias, numerator, denominator), grad_y)
    grad = grad + grad_total
    return grad, grad.to(ctx.branch_dtype), *grads, None, None, None


_value = by_device(add_norm_rational_value, add_norm_rational_forward)
add_norm_rational_operator = differentiable(
    "add_norm_rational",
    (_forward, _shapes_of_results),
    (by_device(add_norm_rational_gradients, add_norm_rational_backward), _shapes_of_gradients),
    _save,
    _gradients,
    _formula_gradients,
    num_outputs=2,
)
_norm_value = by_device(norm_value, norm_forward)
_norm_gradients = by_device(norm_gradients, norm_backward)


class _NormBeside(torch.autograd.Function):
    """Layer norm that also returns its input, which an operator of `torch.library` may not."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        y, mean, rstd = _norm_value(x, weight, bias, eps, dtype)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.eps = eps
        return x.view_as(x), y

    @staticmethod
    def backward(ctx, grad_total, grad_y):  # pyright: ignore[reportIncompatibleMethodOverride]
        if needs_formula(grad_y):
            x, _, _, *parameters = ctx.saved_tensors
            formula = partial(_norm, eps=ctx.eps, dtype=grad_y.dtype)
            grad, *grads = by_formula(formula, (x, *parameters), grad_y)
            return grad_total + grad, *grads, None, None
        return *_norm_gradients(grad_total.contiguous(), grad_y.contiguous(), *ctx.saved_tensors), None, None
