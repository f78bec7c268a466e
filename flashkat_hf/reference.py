"""The group rational function in plain PyTorch: value, closed-form gradients, and a form for exporters.

    y = P(x) / Q(x),   P(x) = a_0 + a_1 x + ... + a_5 x^5,   Q(x) = 1 + |b_1||x| + |b_2||x|^2 + |b_3||x|^3 + |b_4||x|^4

with one pair of rows (a, b) for each group of neighbouring channels. Three facts that are easy to get wrong:

1. Each term of Q is made positive, so Q >= 1 and there is no pole. The paper's 1 + |b_1 x + ... + b_4 x^4| is another
   function; coefficients are only right for the form that they were fitted to.
2. The sign of zero counts as +1, for x and for b: the identity starts with b = 0 and must still learn, and `torch.abs`
   has a zero gradient there.
3. Coefficient gradients add up millions of terms: in float32 (float64 for float64 input), block by block.

This file is the CPU path, the oracle of the tests and the documentation at once. Arithmetic is float32 for float32,
bfloat16 and float16 input and float64 for float64; the result is rounded to the input's dtype once. The work goes over
blocks of rows that fit a processor's cache, so the extra memory is the output and a few blocks.

Source: Yang and Wang, Kolmogorov-Arnold Transformer, ICLR 2025, with the denominator of its released kernels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**16  # 256 KB in float32; about eight blocks are alive at once


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
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):  # pyright: ignore[reportIncompatibleMethodOverride]
        return rational_gradients(grad_y, *ctx.saved_tensors)


def rational_value(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """P(x) / Q(x), without autograd; arguments as in `rational_reference`."""
    a, b = _coefficients(x, numerator, denominator)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for x_block, y_block in _blocks(_num_groups(numerator, denominator), x, y):
        x_block = x_block.to(a.dtype)
        y_block.copy_(_horner(x_block, a).div_(_horner(x_block.abs(), b)))
    return y


def rational_gradients(
    grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Closed-form gradients of `sum(grad_y * y)` with respect to x, numerator and denominator.

    With s(v) = -1 for v < 0 and +1 otherwise, u = grad_y / Q and F = P / Q:

        grad_x   = u (P'(x) - F s(x) (|b_1| + 2 |b_2||x| + 3 |b_3||x|^2 + 4 |b_4||x|^3))
        grad_a_k = sum of u x^k
        grad_b_k = sum of -u F |x|^k s(b_k)

    Returns:
        Three tensors with the shapes and dtypes of x, numerator and denominator.
    """
    num_groups = _num_groups(numerator, denominator)
    a, b = _coefficients(x, numerator, denominator)
    a_slope, b_slope = _derivative(a), _derivative(b)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_a, grad_b = a.new_zeros(6, num_groups), b.new_zeros(4, num_groups)
    for grad_y_block, x_block, grad_x_block in _blocks(num_groups, grad_y, x, grad_x):
        x_block = x_block.to(a.dtype)
        absolute = x_block.abs()
        q = _horner(absolute, b)
        f = _horner(x_block, a).div_(q)
        u = grad_y_block / q
        q_slope = _horner(absolute, b_slope).mul_(_sign(x_block))
        grad_x_block.copy_(_horner(x_block, a_slope).sub_(q_slope.mul_(f)).mul_(u))
        term = f.mul_(u).neg_()
        for k in range(4):
            grad_b[k] += term.mul_(absolute).sum((0, 2))
        term = u
        for k in range(6):
            grad_a[k] += term.sum((0, 2))
            term.mul_(x_block)
    return grad_x, *coefficient_gradients(grad_a.T, grad_b.T, numerator, denominator)


def coefficient_gradients(
    grad_a: Tensor, grad_b: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor]:
    """Each group's sums for a `(num_groups, 6)` and |b| `(num_groups, 4)` as the gradients of the two tables."""
    grad_numerator = grad_a.sum_to_size(numerator.shape)
    grad_denominator = grad_b.sum_to_size(denominator.shape) * _sign(denominator)
    return grad_numerator.to(numerator.dtype).contiguous(), grad_denominator.to(denominator.dtype).contiguous()


def rational_decomposed(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """The same function as a short graph of PyTorch operations that autograd differentiates, zeros included.

    For `torch.export`, ONNX and compilation for CPU, which look inside and fuse it.
    """
    a, b = _coefficients(x, numerator, denominator)
    grouped = x.to(a.dtype).unflatten(-1, (_num_groups(numerator, denominator), -1))
    y = _horner(grouped, a) / _horner(grouped * _sign(grouped), b)
    return y.flatten(-2).to(x.dtype)


def _num_groups(numerator: Tensor, denominator: Tensor) -> int:
    return max(numerator.shape[0], denominator.shape[0])


def _coefficients(x: Tensor, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    """P's `(6, groups, 1)` and Q's `(5, groups, 1)` coefficients, lowest power first, in the arithmetic's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    a, b = (table.to(dtype).T.unsqueeze(-1) for table in (numerator, denominator))
    return a, torch.cat((torch.ones_like(b[:1]), b * _sign(b)))


def _horner(x: Tensor, coefficients: Tensor) -> Tensor:
    """c_0 + c_1 x + ... + c_n x^n in n fused multiply-adds over `(..., num_groups, group_size)`."""
    *lower, second, first = coefficients.unbind()
    value = torch.addcmul(second, x, first)
    for coefficient in reversed(lower):
        value = torch.addcmul(coefficient, value, x)
    return value


def _derivative(coefficients: Tensor) -> Tensor:
    powers = torch.arange(len(coefficients), dtype=coefficients.dtype, device=coefficients.device)
    return (coefficients * powers[:, None, None])[1:]


def _sign(v: Tensor) -> Tensor:
    return torch.where(v < 0, -1.0, 1.0)


def _blocks(num_groups: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Views `(rows, num_groups, group_size)` of matching tensors, a cache-sized block of rows at a time."""
    hidden_size = tensors[0].shape[-1]
    shape = (tensors[0].numel() // hidden_size, num_groups, hidden_size // num_groups)
    rows = max(1, BLOCK_ELEMENTS // hidden_size)
    return zip(*(tensor.reshape(shape).split(rows) for tensor in tensors), strict=True)
