"""The operators: `rational`, and the same fused with its neighbours. They check, pick the kernel and differentiate.

The kernels are registered with `torch.library` under `flashkat::`: the dispatcher picks the device, `torch.compile`
sees opaque operations and breaks no graph, and all of them run without a GPU. A copy of this file, as checkpoints bring
it, registers under its own package's name, since PyTorch would put it in the place of the first.
"""

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from .reference import (
    add_norm_rational_gradients,
    add_norm_rational_value,
    norm_gradients,
    norm_value,
    packed_attention_gradients,
    packed_attention_value,
    rational_decomposed,
    rational_gradients,
    rational_linear_gradients,
    rational_value,
)

try:
    from .triton_attention import packed_attention_backward, packed_attention_forward
    from .triton_norm_rational import (
        add_norm_rational_backward,
        add_norm_rational_forward,
        norm_backward,
        norm_forward,
    )
    from .triton_rational import rational_backward, rational_forward
    from .triton_rational_linear import rational_linear_backward
except ImportError:  # no triton: the plain path serves every device
    rational_forward, rational_backward = rational_value, rational_gradients
    rational_linear_backward = rational_linear_gradients
    packed_attention_forward, packed_attention_backward = packed_attention_value, packed_attention_gradients
    add_norm_rational_forward, add_norm_rational_backward = add_norm_rational_value, add_norm_rational_gradients
    norm_forward, norm_backward = norm_value, norm_gradients

PACKAGE = __name__.rpartition(".")[0]
NAMESPACE = "flashkat" if PACKAGE == "flashkat_hf" else re.sub(r"\W", "_", PACKAGE, flags=re.ASCII)
TRITON_DEVICES = ("cuda", "xpu")  # "cuda" is ROCm's name too
MAX_BATCH = 65_535  # CUDA's limit of a grid's third axis
MAX_TOKENS = 256  # beyond, PyTorch's own attention was the faster one (577 and 1025 tokens, an H100)
HEAD_DIMS = (16, 32, 64)


def rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Apply one learned rational function to each group of channels.

        y = (a_0 + a_1 x + ... + a_5 x^5) / (1 + |b_1||x| + |b_2||x|^2 + |b_3||x|^3 + |b_4||x|^4)

    Args:
        x: `(..., hidden_size)`; float32, bfloat16, float16 or float64, any strides.
        numerator: `(num_groups, 6)`, constant term first; `(1, 6)` serves all groups.
        denominator: `(num_groups, 4)`, linear term first, signs are ignored; `(1, 4)` serves all groups.

    Returns:
        Same shape, dtype and device as `x`, under autocast too. Float32 arithmetic (float64 for float64), rounded once.
        Gradients are closed-form, with the sign of zero taken as +1, and the same from run to run, bit for bit.

    Raises:
        ValueError: `x` is not of a real floating dtype or has no channels, a table has another shape, `hidden_size` is
            not a multiple of `num_groups`, or the tensors are on different devices.

    Source: Yang and Wang, Kolmogorov-Arnold Transformer, ICLR 2025, with |b_j| taken term by term.
    """
    _check(x, numerator, denominator)
    if _decompose(x):
        return rational_decomposed(x, numerator, denominator)
    return _rational(x.contiguous(), numerator.contiguous(), denominator.contiguous())


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
    _check(x, numerator, denominator)
    if x_bias.shape != x.shape[-1:]:
        raise ValueError(f"x_bias must have shape {tuple(x.shape[-1:])}, not {tuple(x_bias.shape)}")
    if _decompose(x):
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
    _check(residual, numerator, denominator)
    if branch.shape != residual.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)} but branch {tuple(branch.shape)}")
    biases = () if branch_bias is None or later_bias is None else (branch_bias, later_bias)
    if (branch_bias is None) != (later_bias is None):
        raise ValueError("branch_bias and later_bias go together")
    if {vector.shape for vector in (weight, bias, *biases)} != {residual.shape[-1:]}:
        shapes = ", ".join(str(tuple(vector.shape)) for vector in (weight, bias, *biases))
        raise ValueError(f"weight and biases must have shape {tuple(residual.shape[-1:])}, not {shapes}")
    if _decompose(residual):
        for vector in biases[:1]:
            branch = branch + _unrecorded(vector, branch.dtype)
        total = (residual + branch).to(residual.dtype)
        normal = layer_norm(total.to(weight.dtype), weight.shape, weight, bias, eps)
        for vector in biases[1:]:
            total = total + _unrecorded(vector, total.dtype)
        return total, rational_decomposed(normal, numerator, denominator).to(branch.dtype)
    summands = residual.contiguous(), branch.contiguous()
    tables = numerator.contiguous(), denominator.contiguous()
    return _add_norm_rational(*summands, weight, bias, *tables, eps, *(biases or (None, None)))[:2]


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


def _decompose(x: Tensor) -> bool:
    # PyTorch 2.11 answers is_exporting() with True under torch.compile.
    if torch.compiler.is_dynamo_compiling():
        return x.device.type == "cpu"
    return torch.compiler.is_exporting() or (torch.compiler.is_compiling() and x.device.type == "cpu")


def _open_operator(name: str) -> Any:
    """Registers an operator that `torch.compile` looks into, to launch its kernel with less work for the host."""
    return torch.library.triton_op(f"{NAMESPACE}::{name}", mutates_args=())


def _unrecorded(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """0, with the gradient of a bias whose addition did not record it."""
    return (bias - bias.detach()).to(dtype)


def _has_kernel(x: Tensor) -> bool:
    return x.device.type in TRITON_DEVICES and x.dtype != torch.float64


def _check(x: Tensor, numerator: Tensor, denominator: Tensor) -> None:
    for name, tensor in (("x", x), ("numerator", numerator), ("denominator", denominator)):
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, not {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} is on {tensor.device}; they must be on one device")
    for name, table, columns in (("numerator", numerator, 6), ("denominator", denominator, 4)):
        if table.ndim != 2 or table.shape[1] != columns or table.shape[0] == 0:
            raise ValueError(
                f"{name} must have shape (num_groups, {columns}) or (1, {columns}), not {tuple(table.shape)}"
            )
    rows = {numerator.shape[0], denominator.shape[0]}
    num_groups = max(rows)
    if not rows <= {1, num_groups}:
        raise ValueError(
            f"numerator has {numerator.shape[0]} rows and denominator {denominator.shape[0]}; they must agree or be 1"
        )
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have at least one dimension and one channel, not shape {tuple(x.shape)}")
    if x.shape[-1] % num_groups:
        raise ValueError(f"hidden_size ({x.shape[-1]}) must be a multiple of num_groups ({num_groups})")


@_open_operator("rational")
def _rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    forward = rational_forward if _has_kernel(x) else rational_value
    return forward(x, numerator, denominator)


@torch.library.custom_op(f"{NAMESPACE}::rational_backward", mutates_args=())
def _rational_backward(
    grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    backward = rational_backward if _has_kernel(x) else rational_gradients
    return backward(grad_y, x, numerator, denominator)


@_rational.register_fake
def _(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_rational_backward.register_fake
def _(grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, torch.empty_like(numerator), torch.empty_like(denominator)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _rational_backward(grad_y.contiguous(), *ctx.saved_tensors)


_rational.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(f"{NAMESPACE}::rational_linear_backward", mutates_args=())
def _rational_linear_backward(
    grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backward = rational_linear_backward if _has_kernel(x) else rational_linear_gradients
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
        return linear(_rational(x, numerator, denominator), weight, bias)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, numerator, denominator, weight, x_bias = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_y = (rows @ weight).view(x.shape)
        grad_x, y, columns, *grad_tables = _rational_linear_backward(grad_y, x, numerator, denominator)
        grad_weight = rows.T @ y.view(-1, y.shape[-1]) if ctx.needs_input_grad[3] else None
        grad_bias = rows.sum(0) if ctx.needs_input_grad[4] else None
        return grad_x, *grad_tables, grad_weight, grad_bias, columns.to(x_bias.dtype)


@_open_operator("add_norm_rational")
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
    forward = add_norm_rational_forward if _has_kernel(residual) else add_norm_rational_value
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
    backward = add_norm_rational_backward if _has_kernel(total) else add_norm_rational_gradients
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
        kernel = _has_kernel(x)
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
    forward = packed_attention_forward if _has_kernel(qkv) else packed_attention_value
    return forward(qkv, num_heads, scale)


@torch.library.custom_op(f"{NAMESPACE}::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    grad_y: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    backward = packed_attention_backward if _has_kernel(qkv) else packed_attention_gradients
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
