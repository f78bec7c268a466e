"""The group rational function in plain PyTorch: value, closed-form gradients, and a form for exporters.

    y = P(x) / Q(x),   P(x) = a_0 + a_1 x + ... + a_5 x^5,
                       Q(x) = 1 + |b_1||x| + |b_2||x|^2 + |b_3||x|^3 + |b_4||x|^4

with one pair of rows (a, b) for each group of neighbouring channels. Three facts that are easy to get wrong:

1. Each term of Q is made positive, so Q >= 1 and there is no pole. The paper's 1 + |b_1 x + ... + b_4 x^4| is
   another function; coefficients are only right for the form that they were fitted to.
2. The sign of zero counts as +1, for x and for b: the identity starts with b = 0 and must still learn, and
   `torch.abs` has a zero gradient there.
3. Coefficient gradients add up millions of terms: in float32 (float64 for float64 input), block by block.

Beside it stand what the fused kernels compute: the rational with its neighbours, and the attention.

This file is the CPU path, the oracle of the tests and the documentation at once. Arithmetic is float32 for
float32, bfloat16 and float16 input and float64 for float64; the result is rounded to the input's dtype once.
The work goes over blocks of rows that fit a processor's cache, so the extra memory is the output and a few
blocks.

Source: Yang and Wang, Kolmogorov-Arnold Transformer, ICLR 2025, with the denominator of its released kernels.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

BLOCK_ELEMENTS = 2**17  # 512 KB in float32; about eight blocks are alive at once


def rational_reference(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Group rational with closed-form gradients; keeps only x and the coefficients for backward.

    Args:
        x: `(..., hidden_size)`, any float dtype.
        numerator: `(1 or num_groups, 6)`, constant term first.
        denominator: `(1 or num_groups, 4)`, linear term first; signs are ignored.

    Returns:
        Same shape, dtype and device as `x`.
    """
    return _Rational.apply(x, numerator, denominator)  # pyright: ignore[reportReturnType]


class _Rational(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, numerator, denominator):
        ctx.save_for_backward(x, numerator, denominator)
        return rational_value(x, numerator, denominator)

    @staticmethod
    def backward(ctx, grad_y):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # for a second derivative
            return torch.func.vjp(rational_decomposed, *ctx.saved_tensors)[1](grad_y)
        return rational_gradients(grad_y, *ctx.saved_tensors)


def rational_value(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return P(x) / Q(x), without autograd; arguments as in `rational_reference`."""
    a, b = _channel_coefficients(x, numerator, denominator)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for x_block, y_block in _blocks(x, y):
        x_block = x_block.to(a.dtype)
        y_block.copy_(_horner(x_block, a).div_(_horner(x_block.abs(), b)))
    return y


def rational_gradients(
    grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `sum(grad_y * y)` in closed form with respect to x, numerator and denominator.

    With s(v) = -1 for v < 0 and +1 otherwise, u = grad_y / Q and F = P / Q:

        grad_x   = u (P'(x) - F s(x) (|b_1| + 2 |b_2||x| + 3 |b_3||x|^2 + 4 |b_4||x|^3))
        grad_a_k = sum of u x^k
        grad_b_k = sum of -u F |x|^k s(b_k)

    Returns:
        Three tensors with the shapes and dtypes of x, numerator and denominator.
    """
    a, b = _channel_coefficients(x, numerator, denominator)
    a_slope, b_slope = _derivative(a), _derivative(b)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b_slope)  # of each channel
    for grad_y_block, x_block, grad_x_block in _blocks(grad_y, x, grad_x):
        x_block = x_block.to(a.dtype)
        absolute = x_block.abs()
        q = _horner(absolute, b)
        f = _horner(x_block, a).div_(q)
        u = grad_y_block / q
        # the slope for x >= 0 is not negative, so it can take the sign of x; + 0.0 makes -0.0 plain
        q_slope = _horner(absolute, b_slope).copysign_(x_block + 0.0)
        grad_x_block.copy_(_horner(x_block, a_slope).sub_(q_slope.mul_(f)).mul_(u))
        term = f.mul_(u)
        for grad in grad_b:
            grad -= term.mul_(absolute).sum(0)
        term = u
        for k, grad in enumerate(grad_a):
            grad += (term.mul_(x_block) if k else term).sum(0)
    num_groups = _num_groups(numerator, denominator)
    grad_a, grad_b = (grad.unflatten(1, (num_groups, -1)).sum(2).T for grad in (grad_a, grad_b))
    return grad_x, *coefficient_gradients(grad_a, grad_b, numerator, denominator)


def rational_mlp_gradients(
    grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what a rational between two linear maps gives in backward.

    Returns:
        grad_x, y, the column sums of grad_x `(hidden_size,)` in the arithmetic's dtype, and both tables'
        gradients.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad_x, grad_numerator, grad_denominator = rational_gradients(grad_y, x.to(dtype), numerator, denominator)
    columns = grad_x.view(-1, x.shape[-1]).sum(0)
    return (
        grad_x.to(x.dtype),
        rational_value(x, numerator, denominator),
        columns,
        grad_numerator,
        grad_denominator,
    )


def norm_value(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return layer norm in `dtype`, and each row's mean and reciprocal standard deviation."""
    arithmetic = torch.promote_types(x.dtype, torch.float32)
    norm = weight.to(arithmetic), bias.to(arithmetic)
    y, mean, rstd = torch.native_layer_norm(x.to(arithmetic), weight.shape, *norm, eps)
    return y.to(dtype), mean.squeeze(-1), rstd.squeeze(-1)


def norm_gradients(
    grad_total: Tensor,
    grad_y: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `sum(grad_total * total) + sum(grad_y * layer_norm(total))`.

    Returns:
        That of total, in its dtype, and those of weight and bias.
    """
    normal = _normal(total, mean, rstd)
    grad_y = grad_y.to(normal.dtype)
    grad_weight, grad_bias = (rows.flatten(0, -2).sum(0) for rows in (grad_y * normal, grad_y))
    grad_normal = grad_y * weight
    mean_product = (grad_normal * normal).mean(-1, keepdim=True)
    grad = grad_normal - grad_normal.mean(-1, keepdim=True) - normal * mean_product
    grad = (grad_total + grad * rstd.unsqueeze(-1)).to(total.dtype)
    return grad, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _normal(total: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return rows of mean 0 and variance 1, in the arithmetic's dtype."""
    return (total.to(rstd.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)


def add_norm_rational_value(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute residual addition, layer norm and rational, without autograd.

    Returns:
        total = residual + branch in residual's dtype, the activation in branch's, and mean and reciprocal
        standard deviation of total's rows in the arithmetic's dtype.
    """
    total = (residual + branch).to(residual.dtype)
    x, mean, rstd = norm_value(total, weight, bias, eps, torch.promote_types(total.dtype, torch.float32))
    return total, rational_value(x, numerator, denominator).to(branch.dtype), mean, rstd


def add_norm_rational_gradients(
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
    """Return the gradients of `sum(grad_total * total) + sum(grad_y * y)`.

    Returns:
        That of both summands, in total's dtype; `(2, hidden_size)` in the arithmetic's dtype, those of weight
        and bias, and with `totals` `(4, hidden_size)`, the column sums of that gradient and of `grad_total`
        behind them; and those of numerator and denominator.
    """
    x = _normal(total, mean, rstd) * weight + bias
    grad_x, grad_numerator, grad_denominator = rational_gradients(grad_y, x, numerator, denominator)
    grad, *columns = norm_gradients(grad_total, grad_x, total, mean, rstd, weight, bias)
    if totals:
        columns += [rows.flatten(0, -2).sum(0, dtype=mean.dtype) for rows in (grad, grad_total)]
    columns = torch.stack([column.to(mean.dtype) for column in columns])
    return grad, columns, grad_numerator, grad_denominator


def packed_attention_value(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T) v of each head of `(batch, num_tokens, 3 * hidden_size)`.

    Returns:
        y `(batch, num_tokens, hidden_size)` and the scores' log2-sum-exp2 `(batch, num_heads, num_tokens)` in
        float32.
    """
    query, key, value = _heads(qkv, 3 * num_heads).chunk(3, dim=1)
    score = query @ key.mT * scale
    lse = score.logsumexp(-1)
    y = (score - lse.unsqueeze(-1)).exp() @ value
    return y.transpose(1, 2).flatten(2).to(qkv.dtype), (lse / math.log(2)).float()


def packed_attention_gradients(
    grad_y: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradient of qkv, and its column sums `(3 * hidden_size,)` in float32."""
    num_heads = lse.shape[1]
    query, key, value = _heads(qkv, 3 * num_heads).chunk(3, dim=1)
    y, grad_y = _heads(y, num_heads), _heads(grad_y, num_heads)
    p = (query @ key.mT * scale - lse.unsqueeze(-1) * math.log(2)).exp()
    grad_score = p * (grad_y @ value.mT - (grad_y * y).sum(-1, keepdim=True)) * scale
    grad_qkv = (
        torch.cat((grad_score @ key, grad_score.mT @ query, p.mT @ grad_y), dim=1).transpose(1, 2).flatten(2)
    )
    return grad_qkv.to(qkv.dtype), grad_qkv.sum((0, 1)).float()


def _heads(packed: Tensor, num_heads: int) -> Tensor:
    """Return `(batch, num_heads, num_tokens, head_dim)` in the arithmetic's dtype."""
    dtype = torch.promote_types(packed.dtype, torch.float32)
    return packed.unflatten(-1, (num_heads, -1)).transpose(1, 2).to(dtype)


def coefficient_gradients(
    grad_a: Tensor, grad_b: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor]:
    """Turn each group's sums for a and |b|, `(num_groups, 6)` and `(num_groups, 4)`, into table gradients."""
    grad_numerator = grad_a.sum_to_size(numerator.shape)
    grad_denominator = grad_b.sum_to_size(denominator.shape) * _sign(denominator)
    return grad_numerator.to(numerator.dtype).contiguous(), grad_denominator.to(
        denominator.dtype
    ).contiguous()


def rational_decomposed(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Apply the same function as a short graph of operations that autograd differentiates, zeros included.

    For `torch.export`, ONNX and compilation where no kernel serves: they look inside and fuse it. An exporter
    takes about a millisecond for each operation, so there are few.
    """
    dtype = _arithmetic(x)
    a = in_dtype(dtype, numerator).split(1, dim=1)
    b = _absolute(in_dtype(dtype, denominator)).split(1, dim=1)
    grouped = in_dtype(dtype, x).unflatten(-1, (_num_groups(numerator, denominator), -1))
    absolute = _absolute(grouped)
    y = _horner(grouped, a, reuse=False) / _horner(absolute, b, reuse=False).mul(absolute).add(1)
    return in_dtype(x.dtype, y.flatten(-2))


FORMS = {  # of the denominator, by the names that `GroupRational` knows
    "terms": "1 + |b_1||x| + ... + |b_n||x|^n",
    "sum": "1 + |b_1 x + ... + b_n x^n|",
}


def rational_of_form(x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> Tensor:
    """Apply a group rational of any degrees, by operations that autograd differentiates.

    Args:
        x: `(..., hidden_size)`, any float dtype; arithmetic in float32, float64 for float64.
        numerator: `(1 or num_groups, m + 1)`, m >= 1, constant term first.
        denominator: `(1 or num_groups, n)`, n >= 1, linear term first.
        form: of the denominator, a name in `FORMS`.

    Source: of the form "sum" Molina et al., Pade activation units, ICLR 2020, their "safe" denominator.
    """
    if form == "terms":
        return rational_decomposed(x, numerator, denominator)
    dtype = torch.promote_types(x.dtype, torch.float32)
    a, b = (table.to(dtype).split(1, dim=1) for table in (numerator, denominator))
    grouped = x.to(dtype).unflatten(-1, (_num_groups(numerator, denominator), -1))
    total = _horner(grouped, (torch.zeros_like(b[0]), *b), reuse=False)
    return (_horner(grouped, a, reuse=False) / (1 + _absolute(total))).flatten(-2).to(x.dtype)


def _num_groups(numerator: Tensor, denominator: Tensor) -> int:
    return max(numerator.shape[0], denominator.shape[0])


def _coefficients(x: Tensor, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    """Return P's `(6, groups, 1)` and Q's `(5, groups, 1)` coefficients, lowest power first."""
    dtype = _arithmetic(x)
    a, b = (in_dtype(dtype, table).T.unsqueeze(-1) for table in (numerator, denominator))
    return a, torch.cat((torch.ones_like(b[:1]), _absolute(b)))


def _channel_coefficients(x: Tensor, numerator: Tensor, denominator: Tensor) -> Iterable[Tensor]:
    """Return the same for each channel, `(6, hidden_size)` and `(5, hidden_size)`.

    Long rows, which PyTorch vectorises.
    """
    for table in _coefficients(x, numerator, denominator):
        yield table.squeeze(-1).repeat_interleave(x.shape[-1] // table.shape[1], dim=1)


def _arithmetic(x: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic for x; `torch.promote_types` would be a node of a traced graph."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _horner(x: Tensor, coefficients: Iterable[Tensor], reuse: bool = True) -> Tensor:
    """Return c_0 + c_1 x + ... + c_n x^n, each coefficient broadcast over x's last dimensions.

    `reuse` writes each step over the one before, which autograd cannot look through.
    """
    lower = list(coefficients)
    value = lower.pop()
    if lower:
        value = (x * value).add_(lower.pop())  # addcmul with two small operands is not vectorised
    for coefficient in reversed(lower):
        value = torch.addcmul(coefficient, value, x, out=value if reuse else None)
    return value


def in_dtype(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """Return the tensor in a dtype; with no operation in a traced graph where it has that."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _derivative(coefficients: Tensor) -> Tensor:
    powers = torch.arange(len(coefficients), dtype=coefficients.dtype, device=coefficients.device)
    return (coefficients * powers[:, None])[1:]


def _absolute(v: Tensor) -> Tensor:
    """Return |v|, whose slope at zero is +1, by two operations."""
    return functional.leaky_relu(-v, -1.0)  # which counts zero to the values below it


def _sign(v: Tensor) -> Tensor:
    return torch.where(v < 0, -1.0, 1.0)


def _blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Yield views `(rows, hidden_size)` of matching tensors, a cache-sized block of rows at a time."""
    hidden_size = tensors[0].shape[-1]
    shape = (tensors[0].numel() // hidden_size, hidden_size)
    rows = max(1, BLOCK_ELEMENTS // hidden_size)
    return zip(*(tensor.reshape(shape).split(rows) for tensor in tensors), strict=True)
