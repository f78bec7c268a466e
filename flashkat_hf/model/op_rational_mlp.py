"""The operator `rational_mlp`: a linear map, a rational and a second linear map."""

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from .op_rational import check_arguments, value
from .operators import (
    HALF,
    by_device,
    by_formula,
    called_directly,
    decomposes,
    has_kernel,
    needs_formula,
    register,
    register_backward,
)
from .reference import rational_decomposed, rational_mlp_gradients

try:
    from .triton_rational_mlp import rational_mlp_backward, rational_mlp_forward
    from .triton_tiles import linear_tile
except ImportError:  # no triton: the plain path serves every device
    linear_tile = rational_mlp_forward = rational_mlp_backward = None


def rational_mlp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
) -> Tensor:
    """Compute `linear(rational(linear(x, weight, bias)), out_weight, out_bias)`.

    Forward applies the rational where the first product is made. Backward computes it again instead of
    keeping it, and sums the columns of its input's gradient, the gradient of `bias`, on the way.

    Args:
        x: `(..., in_features)`, of the dtype of both weights.
        weight: `(hidden_size, in_features)`.
        bias: `(hidden_size,)`, any dtype.
        numerator: as in `rational`.
        denominator: as in `rational`.
        out_weight: `(out_features, hidden_size)`.
        out_bias: `(out_features,)`, any dtype.

    Returns:
        `(..., out_features)`, in x's dtype.

    Raises:
        ValueError: as in `rational`, or shapes that do not fit.
    """
    check_arguments(weight.T, numerator, denominator)
    shapes = [tuple(tensor.shape) for tensor in (weight, bias, out_weight, out_bias)]
    hidden_size, out_features = weight.shape[0], out_weight.shape[0]
    if shapes != [(hidden_size, x.shape[-1]), (hidden_size,), (out_features, hidden_size), (out_features,)]:
        raise ValueError(
            f"weights and biases of shapes {shapes} do not fit each other and x {tuple(x.shape)}"
        )
    if decomposes(x):
        return _decomposed(x, weight, bias, numerator, denominator, out_weight, out_bias)
    tables = numerator.contiguous(), denominator.contiguous()
    parameters = weight.contiguous(), bias, *tables, out_weight, out_bias
    return _RationalMlp.apply(x.contiguous(), *parameters, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


def _decomposed(x, weight, bias, numerator, denominator, out_weight, out_bias) -> Tensor:
    hidden = rational_decomposed(linear(x, weight, bias.to(x.dtype)), numerator, denominator)
    return linear(hidden, out_weight, out_bias.to(x.dtype))


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, numerator: Tensor, denominator: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    if linear_tile and rational_mlp_forward and has_kernel(x) and x.dtype in HALF:
        group_size = weight.shape[0] // max(numerator.shape[0], denominator.shape[0])
        if linear_tile(x.shape[-1], weight.shape[0], group_size):
            return rational_mlp_forward(x, weight, bias, numerator, denominator, keep)
    product = linear(x, weight, bias.to(x.dtype))
    return value(product, numerator, denominator), product if keep else product.new_empty(0)


def _shapes_of_y_and_product(x, weight, bias, numerator, denominator, keep):
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, torch.empty_like(y) if keep else y.new_empty(0)


def _shapes_of_gradients(grad_y, x, numerator, denominator):
    columns = x.new_empty(x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return (
        torch.empty_like(x),
        torch.empty_like(x),
        columns,
        torch.empty_like(numerator),
        torch.empty_like(denominator),
    )


def _flops(x, weight, *_, **__) -> int:
    return 2 * math.prod(x) * weight[0]


_gradients = by_device(rational_mlp_gradients, rational_mlp_backward)
forward_operator = called_directly(
    register("rational_mlp_forward", _forward, _shapes_of_y_and_product, open_to_compiler=True, flops=_flops),
    _forward,
)
backward_operator = called_directly(
    register_backward("rational_mlp_backward", _gradients, _shapes_of_gradients), _gradients
)


class _RationalMlp(torch.autograd.Function):
    """Matrix products of PyTorch around the operators, which see the first product and its gradient alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, numerator, denominator, out_weight, out_bias, keep):
        y, product = forward_operator(x, weight, bias, numerator, denominator, keep)
        ctx.save_for_backward(product, x, weight, bias, numerator, denominator, out_weight, out_bias)
        return linear(y, out_weight, out_bias.to(y.dtype))

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        product, *inputs = ctx.saved_tensors
        if not torch.compiler.is_compiling() and needs_formula(grad):
            return *by_formula(_decomposed, tuple(inputs), grad), None
        x, weight, bias, numerator, denominator, out_weight, out_bias = inputs
        grad = grad.reshape(-1, grad.shape[-1])
        grad_y = (grad @ out_weight).view(product.shape)
        grad_product, y, columns, *grad_tables = backward_operator(grad_y, product, numerator, denominator)
        grad_product, y = grad_product.view(-1, y.shape[-1]), y.view(-1, y.shape[-1])
        wants_x, wants_weight, *_, wants_out_weight, wants_out_bias, _ = ctx.needs_input_grad
        return (
            (grad_product @ weight).view(x.shape) if wants_x else None,
            grad_product.T @ x.view(-1, x.shape[-1]) if wants_weight else None,
            columns.to(bias.dtype),
            *grad_tables,
            grad.T @ y if wants_out_weight else None,
            grad.sum(0, dtype=columns.dtype).to(out_bias.dtype) if wants_out_bias else None,
            None,
        )
