"""The rational fused with its neighbours, and attention.

Operators that check, pick the kernel and differentiate.

They are registered as `rational` is (`ops.py`). A bias whose gradient is made here is added by the caller,
detached; `rational_mlp` adds its own.
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
    rational_mlp_gradients,
)

try:
    from .triton_attention import packed_attention_backward, packed_attention_forward
    from .triton_norm_rational import (
        add_norm_rational_backward,
        add_norm_rational_forward,
        norm_backward,
        norm_forward,
    )
    from .triton_rational_mlp import rational_mlp_backward, rational_mlp_forward
    from .triton_tiles import linear_tile
except ImportError:  # no triton: the plain path serves every device
    rational_mlp_backward = rational_mlp_gradients
    packed_attention_forward, packed_attention_backward = packed_attention_value, packed_attention_gradients
    add_norm_rational_forward, add_norm_rational_backward = (
        add_norm_rational_value,
        add_norm_rational_gradients,
    )
    norm_forward, norm_backward = norm_value, norm_gradients
    linear_tile = rational_mlp_forward = None

MAX_BATCH = 65_535  # CUDA's limit of a grid's third axis
MAX_TOKENS = 256  # beyond, PyTorch's own attention was the faster one (577 and 1025 tokens, an H100)
HEAD_DIMS = (16, 32, 64)
HALF = (torch.bfloat16, torch.float16)


def rational_mlp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
) -> Tensor:
    """`linear(rational(linear(x, weight, bias)), out_weight, out_bias)`.

    An MLP with a rational between its maps.

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
        hidden = rational_decomposed(linear(x, weight, bias.to(x.dtype)), numerator, denominator)
        return linear(hidden, out_weight, out_bias.to(x.dtype))
    tables = numerator.contiguous(), denominator.contiguous()
    parameters = weight.contiguous(), bias, *tables, out_weight, out_bias
    return _RationalMlp.apply(x.contiguous(), *parameters, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


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
        branch_bias: `(hidden_size,)`, any dtype; branch already contains it, by an addition that did not
            record its gradient, which is made here.
        later_bias: likewise contained in what is added to `total`, which goes nowhere else. Both or none of
            the two.

    Returns:
        `total` in residual's dtype and the activation in branch's. Float32 arithmetic; the norm sees the
        rounded total.

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


def norm_beside(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
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
        qkv: `(batch, num_tokens, 3 * hidden_size)`, bfloat16 or float16; queries, keys and values, each head
            by head; at most 256 tokens and heads of 16, 32 or 64 channels.
        num_heads: heads.
        scale: factor of the scores, positive.
        qkv_bias: `(3 * hidden_size,)`, any dtype; qkv already contains it, by an addition that did not record
            its gradient, which is made here.

    Returns:
        `(batch, num_tokens, hidden_size)`.

    Raises:
        ValueError: another shape, dtype or scale.
    """
    if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads) or qkv.shape[2] // (3 * num_heads) not in HEAD_DIMS:
        raise ValueError(
            f"qkv must be (batch, tokens, 3 * {num_heads} heads of {HEAD_DIMS}), not {tuple(qkv.shape)}"
        )
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}")
    if qkv.shape[0] > MAX_BATCH:
        raise ValueError(f"qkv has {qkv.shape[0]} samples; the attention kernels take {MAX_BATCH} at most")
    if qkv.shape[1] > MAX_TOKENS or qkv.dtype not in HALF:
        raise ValueError(
            f"qkv must be half precision and of at most {MAX_TOKENS} tokens, not {qkv.shape[1]} {qkv.dtype}"
        )
    return _packed_attention(qkv.contiguous(), qkv_bias, num_heads, scale)[0]


def _unrecorded(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """0, with the gradient of a bias whose addition did not record it."""
    return (bias - bias.detach()).to(dtype)


@open_operator("rational_mlp_forward")
def _rational_mlp_forward(
    x: Tensor, weight: Tensor, bias: Tensor, numerator: Tensor, denominator: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    if linear_tile and rational_mlp_forward and has_kernel(x) and x.dtype in HALF:
        group_size = weight.shape[0] // max(numerator.shape[0], denominator.shape[0])
        if linear_tile(x.shape[-1], weight.shape[0], group_size):
            return rational_mlp_forward(x, weight, bias, numerator, denominator, keep)
    product = linear(x, weight, bias.to(x.dtype))
    return rational_operator(product, numerator, denominator), product if keep else product.new_empty(0)


@_rational_mlp_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, numerator: Tensor, denominator: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, torch.empty_like(y) if keep else y.new_empty(0)


@torch.library.custom_op(f"{NAMESPACE}::rational_mlp_backward", mutates_args=())
def _rational_mlp_backward(
    grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backward = rational_mlp_backward if has_kernel(x) else rational_mlp_gradients
    return backward(grad_y, x, numerator, denominator)


@_rational_mlp_backward.register_fake
def _(
    grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns = x.new_empty(x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    tables = torch.empty_like(numerator), torch.empty_like(denominator)
    return torch.empty_like(x), torch.empty_like(x), columns, *tables


class _RationalMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, numerator, denominator, out_weight, out_bias, keep):
        y, product = _rational_mlp_forward(x, weight, bias, numerator, denominator, keep)
        ctx.save_for_backward(x, product, weight, numerator, denominator, out_weight)
        ctx.bias_dtypes = bias.dtype, out_bias.dtype
        return linear(y, out_weight, out_bias.to(y.dtype))

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, product, weight, numerator, denominator, out_weight = ctx.saved_tensors
        bias_dtype, out_bias_dtype = ctx.bias_dtypes
        grad = grad.reshape(-1, grad.shape[-1])
        grad_y = (grad @ out_weight).view(product.shape)
        grad_product, y, columns, *grad_tables = _rational_mlp_backward(
            grad_y, product, numerator, denominator
        )
        grad_product, y = grad_product.view(-1, y.shape[-1]), y.view(-1, y.shape[-1])
        wants_x, wants_weight, *_, wants_out_weight, wants_out_bias, _ = ctx.needs_input_grad
        return (
            (grad_product @ weight).view(x.shape) if wants_x else None,
            grad_product.T @ x.view(-1, x.shape[-1]) if wants_weight else None,
            columns.to(bias_dtype),
            *grad_tables,
            grad.T @ y if wants_out_weight else None,
            grad.sum(0, dtype=columns.dtype).to(out_bias_dtype) if wants_out_bias else None,
            None,
        )


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
    ctx.vector_dtypes = [
        vector.dtype for vector in (*parameters[:2], branch_bias, later_bias) if vector is not None
    ]
    ctx.mark_non_differentiable(mean, rstd)


def _add_norm_rational_autograd(ctx, grad_total: Tensor, grad_y: Tensor, *_) -> tuple:
    dtypes = ctx.vector_dtypes
    grad, columns, *grad_tables = _add_norm_rational_backward(
        grad_total.contiguous(), grad_y.contiguous(), *ctx.saved_tensors, len(dtypes) == 4
    )
    vectors = [column.to(dtype) for column, dtype in zip(columns, dtypes, strict=True)]
    grad_weight, grad_bias, *grad_biases = vectors
    return (
        grad,
        grad.to(ctx.branch_dtype),
        grad_weight,
        grad_bias,
        *grad_tables,
        None,
        *(grad_biases or (None, None)),
    )


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


@open_operator("packed_attention")
def _packed_attention(
    qkv: Tensor, qkv_bias: Tensor | None, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
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
