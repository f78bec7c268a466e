"""The rational fused with its neighbours, and attention: operators that check, pick the kernel and differentiate.

They are registered as `rational` is (`ops.py`). A bias whose gradient is made here is added by the caller, detached.
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from .ops import NAMESPACE, check_arguments, decomposes, has_kernel, open_operator, rational_operator
from .reference import (
    add_norm_rational_gradients,
    add_norm_rational_value,
    norm_gradients,
    norm_value,
    packed_attention_gradients,
    packed_attention_value,
    rational_decomposed,
    rational_linear_gradients,
)

try:
    from .triton_attention import packed_attention_backward, packed_attention_forward
    from .triton_norm_rational import (
        add_norm_rational_backward,
        add_norm_rational_forward,
        norm_backward,
        norm_forward,
    )
    from .triton_rational_linear import rational_linear_backward
except ImportError:  # no triton: the plain path serves every device
    rational_linear_backward = rational_linear_gradients
    packed_attention_forward, packed_attention_backward = packed_attention_value, packed_attention_gradients
    add_norm_rational_forward, add_norm_rational_backward = add_norm_rational_value, add_norm_rational_gradients
    norm_forward, norm_backward = norm_value, norm_gradients

MAX_BATCH = 65_535  # CUDA's limit of a grid's third axis
MAX_TOKENS = 256  # beyond, PyTorch's own attention was the faster one (577 and 1025 tokens, an H100)
HEAD_DIMS = (16, 32, 64)


def rational_linear(
    x: Tensor, numerator: Tensor, denominator: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor
) -> Tensor:
    """`linear(rational(x), weight, bias)`, one group-rational KAN layer, where x is another linear map's output.

    Backward computes the rational again instead of keeping it, and sums the columns of x's gradient on the way: that is
    the gradient of the bias in front.

    Args:
        x: `(..., hidden_size)`, of the dtype of `weight` and `bias`.
        numerator: as in `rational`.
        denominator: as in `rational`.
        weight: `(out_features, hidden_size)`.
        bias: `(out_features,)`.
        x_bias: `(hidden_size,)`, any dtype; x already contains it, by an addition that did not record its gradient.

    Returns:
        `(..., out_features)`.

    Raises:
        ValueError: as in `rational`, or `x_bias` is not `(hidden_size,)`.
    """
    check_arguments(x, numerator, denominator)
    if x_bias.shape != x.shape[-1:]:
        raise ValueError(f"x_bias must have shape {tuple(x.shape[-1:])}, not {tuple(x_bias.shape)}")
    if decomposes(x):
        return linear(rational_decomposed(x + _unrecorded(x_bias, x.dtype), numerator, denominator), weight, bias)
    tables = numerator.contiguous(), denominator.contiguous()
    return _RationalLinear.apply(x.contiguous(), *tables, weight, bias, x_bias)  # pyright: ignore[reportReturnType]


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
    """`total = residual + branch` and `rational(layer_norm(total))` in one pass over memory, and one backward.

    Args:
        residual: `(..., hidden_size)`; float32, bfloat16, float16 or float64, any strides.
        branch: of residual's shape; another dtype is allowed.
        weight: `(hidden_size,)`, of the layer norm.
        bias: `(hidden_size,)`, of the layer norm.
        numerator: as in `rational`.
        denominator: as in `rational`.
        eps: added to the variance.
        branch_bias: `(hidden_size,)`, any dtype; branch already contains it, by an addition that did not record its
            gradient, which is made here.
        later_bias: likewise contained in what is added to `total`, which goes nowhere else. Both or none of the two.

    Returns:
        `total` in residual's dtype and the activation in branch's. Float32 arithmetic; the norm sees the rounded total.

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
            branch = branch + _unrecorded(branch_bias, branch.dtype)
        total = (residual + branch).to(residual.dtype)
        normal = layer_norm(total.to(weight.dtype), weight.shape, weight, bias, eps)
        if later_bias is not None:
            total = total + _unrecorded(later_bias, total.dtype)
        return total, rational_decomposed(normal, numerator, denominator).to(branch.dtype)
    summands = residual.contiguous(), branch.contiguous()
    tables = numerator.contiguous(), denominator.contiguous()
    return _add_norm_rational(*summands, weight, bias, *tables, eps, branch_bias, later_bias)[:2]


def norm_beside(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A residual stream and its layer norm in `dtype`, in one pass; one backward joins both gradients.

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
        raise ValueError(
            f"weight and bias must have shape {tuple(x.shape[-1:])}, not {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    return _NormBeside.apply(x, weight, bias, eps, dtype)  # pyright: ignore[reportReturnType]


def packed_attention(qkv: Tensor, num_heads: int, scale: float, qkv_bias: Tensor | None = None) -> Tensor:
    """Self-attention of short sequences, from the product that holds queries, keys and values.

    Args:
        qkv: `(batch, num_tokens, 3 * hidden_size)`, bfloat16 or float16; queries, keys and values, each head by head;
            at most 256 tokens and heads of 16, 32 or 64 channels.
        num_heads: heads.
        scale: factor of the scores.
        qkv_bias: `(3 * hidden_size,)`, any dtype; qkv already contains it, by an addition that did not record its
            gradient, which is made here.

    Returns:
        `(batch, num_tokens, hidden_size)`.

    Raises:
        ValueError: another shape or dtype.
    """
    if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads) or qkv.shape[2] // (3 * num_heads) not in HEAD_DIMS:
        raise ValueError(f"qkv must be (batch, tokens, 3 * {num_heads} heads of {HEAD_DIMS}), not {tuple(qkv.shape)}")
    if qkv.shape[0] > MAX_BATCH:
        raise ValueError(f"qkv has {qkv.shape[0]} samples; the attention kernels take {MAX_BATCH} at most")
    if qkv.shape[1] > MAX_TOKENS or qkv.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"qkv must be half precision and of at most {MAX_TOKENS} tokens, not {qkv.shape[1]} {qkv.dtype}"
        )
    return _packed_attention(qkv.contiguous(), qkv_bias, num_heads, scale)[0]


def _unrecorded(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """0, with the gradient of a bias whose addition did not record it."""
    return (bias - bias.detach()).to(dtype)


@torch.library.custom_op(f"{NAMESPACE}::rational_linear_backward", mutates_args=())
def _rational_linear_backward(
    grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backward = rational_linear_backward if has_kernel(x) else rational_linear_gradients
    return backward(grad_y, x, numerator, denominator)


@_rational_linear_backward.register_fake
def _(
    grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns = x.new_empty(x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    tables = torch.empty_like(numerator), torch.empty_like(denominator)
    return torch.empty_like(x), torch.empty_like(x), columns, *tables


class _RationalLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, numerator, denominator, weight, bias, x_bias):
        ctx.save_for_backward(x, numerator, denominator, weight, x_bias)
        return linear(rational_operator(x, numerator, denominator), weight, bias)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, numerator, denominator, weight, x_bias = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_y = (rows @ weight).view(x.shape)
        grad_x, y, columns, *grad_tables = _rational_linear_backward(grad_y, x, numerator, denominator)
        grad_weight = rows.T @ y.view(-1, y.shape[-1]) if ctx.needs_input_grad[3] else None
        grad_bias = rows.sum(0) if ctx.needs_input_grad[4] else None
        return grad_x, *grad_tables, grad_weight, grad_bias, columns.to(x_bias.dtype)


@open_operator("add_norm_rational")
def _add_norm_rational(
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
    forward = add_norm_rational_forward if has_kernel(residual) else add_norm_rational_value
    return forward(residual, branch, weight, bias, numerator, denominator, eps)


@_add_norm_rational.register_fake
def _(residual: Tensor, branch: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(residual.dtype, torch.float32)
    mean, rstd = (residual.new_empty(residual.shape[:-1], dtype=dtype) for _ in range(2))
    return torch.empty_like(residual), torch.empty_like(branch), mean, rstd


@torch.library.custom_op(f"{NAMESPACE}::add_norm_rational_backward", mutates_args=())
def _add_norm_rational_backward(
    grad_total: Tensor,
    grad_y: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    totals: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backward = add_norm_rational_backward if has_kernel(total) else add_norm_rational_gradients
    return backward(grad_total, grad_y, total, mean, rstd, weight, bias, numerator, denominator, totals)


@_add_norm_rational_backward.register_fake
def _(
    grad_total: Tensor, grad_y: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    numerator: Tensor, denominator: Tensor, totals: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    columns = mean.new_empty(4 if totals else 2, total.shape[-1])
    return torch.empty_like(total), columns, torch.empty_like(numerator), torch.empty_like(denominator)


def _setup_add_norm_rational(ctx, inputs, output) -> None:
    _, branch, *parameters, _, branch_bias, later_bias = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(total, mean, rstd, *parameters)
    ctx.branch_dtype = branch.dtype
    ctx.vector_dtypes = [vector.dtype for vector in (*parameters[:2], branch_bias, later_bias) if vector is not None]
    ctx.mark_non_differentiable(mean, rstd)


def _add_norm_rational_autograd(ctx, grad_total: Tensor, grad_y: Tensor, *_) -> tuple:
    dtypes = ctx.vector_dtypes
    grad, columns, *grad_tables = _add_norm_rational_backward(
        grad_total.contiguous(), grad_y.contiguous(), *ctx.saved_tensors, len(dtypes) == 4
    )
    vectors = [column.to(dtype) for column, dtype in zip(columns, dtypes, strict=True)]
    grad_weight, grad_bias, *grad_biases = vectors
    return grad, grad.to(ctx.branch_dtype), grad_weight, grad_bias, *grad_tables, None, *(grad_biases or (None, None))


_add_norm_rational.register_autograd(_add_norm_rational_autograd, setup_context=_setup_add_norm_rational)


class _NormBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        kernel = has_kernel(x)
        y, mean, rstd = (norm_forward if kernel else norm_value)(x, weight, bias, eps, dtype)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.backward_of = norm_backward if kernel else norm_gradients
        return x.view_as(x), y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, grad_y):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *ctx.backward_of(grad_total.contiguous(), grad_y.contiguous(), *ctx.saved_tensors), None, None


@torch.library.custom_op(f"{NAMESPACE}::packed_attention", mutates_args=())
def _packed_attention(qkv: Tensor, qkv_bias: Tensor | None, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    forward = packed_attention_forward if has_kernel(qkv) else packed_attention_value
    return forward(qkv, num_heads, scale)


@torch.library.custom_op(f"{NAMESPACE}::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    grad_y: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    backward = packed_attention_backward if has_kernel(qkv) else packed_attention_gradients
    return backward(grad_y, qkv, y, lse, scale)


@_packed_attention.register_fake
def _(qkv: Tensor, qkv_bias: Tensor | None, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    batch, num_tokens, width = qkv.shape
    y = qkv.new_empty(batch, num_tokens, width // 3)
    return y, qkv.new_empty(batch, num_heads, num_tokens, dtype=torch.float32)


@_packed_attention_backward.register_fake
def _(grad_y: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), qkv.new_empty(qkv.shape[-1], dtype=torch.float32)


def _setup_packed_attention(ctx, inputs, output) -> None:
    qkv, qkv_bias, _, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.bias_dtype = None if qkv_bias is None else qkv_bias.dtype
    ctx.mark_non_differentiable(output[1])


def _packed_attention_autograd(ctx, grad_y: Tensor, _) -> tuple:
    grad_qkv, columns = _packed_attention_backward(grad_y.contiguous(), *ctx.saved_tensors, ctx.scale)
    return grad_qkv, None if ctx.bias_dtype is None else columns.to(ctx.bias_dtype), None, None


_packed_attention.register_autograd(_packed_attention_autograd, setup_context=_setup_packed_attention)
