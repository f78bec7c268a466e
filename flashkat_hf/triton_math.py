"""The formula of `reference.py` in Triton: functions on values in registers, shared by every kernel."""

import triton
import triton.language as tl


@triton.jit
def load_numerator(row_ptr):
    """a_0..a_5 in float32; `row_ptr` may be a tensor of pointers."""
    return (
        tl.load(row_ptr).to(tl.float32),
        tl.load(row_ptr + 1).to(tl.float32),
        tl.load(row_ptr + 2).to(tl.float32),
        tl.load(row_ptr + 3).to(tl.float32),
        tl.load(row_ptr + 4).to(tl.float32),
        tl.load(row_ptr + 5).to(tl.float32),
    )


@triton.jit
def load_denominator(row_ptr):
    """|b_1|..|b_4| in float32; `row_ptr` may be a tensor of pointers."""
    return (
        tl.abs(tl.load(row_ptr).to(tl.float32)),
        tl.abs(tl.load(row_ptr + 1).to(tl.float32)),
        tl.abs(tl.load(row_ptr + 2).to(tl.float32)),
        tl.abs(tl.load(row_ptr + 3).to(tl.float32)),
    )


@triton.jit
def quotient(x, a, b):
    """P(x) / Q(x) and 1 / Q(x) by Horner's rule; Q >= 1, so there is no pole.

    P(x) = a0 + a1 x + ... + a5 x^5            a: six values, constant term first
    Q(x) = 1 + b1 |x| + ... + b4 |x|^4         b: four values >= 0
    """
    u = tl.abs(x)
    p = a[0] + x * (a[1] + x * (a[2] + x * (a[3] + x * (a[4] + x * a[5]))))
    q = 1.0 + u * (b[0] + u * (b[1] + u * (b[2] + u * b[3])))
    reciprocal = 1.0 / q
    return p * reciprocal, reciprocal


@triton.jit
def derivative_coefficients(a, b):
    """Those of P' and of Q' as a polynomial in |x|: (a1, 2 a2, .., 5 a5) and (b1, 2 b2, .., 4 b4)."""
    return (a[1], 2 * a[2], 3 * a[3], 4 * a[4], 5 * a[5]), (b[0], 2 * b[1], 3 * b[2], 4 * b[3])


@triton.jit
def slope_times_q(x, f, a_slope, b_slope):
    """Q d(P/Q)/dx = P'(x) - F s(x) Q'(|x|), with F = P/Q, s(0) = +1 and `derivative_coefficients`."""
    u = tl.abs(x)
    p_slope = a_slope[0] + x * (a_slope[1] + x * (a_slope[2] + x * (a_slope[3] + x * a_slope[4])))
    q_slope = f * (b_slope[0] + u * (b_slope[1] + u * (b_slope[2] + u * b_slope[3])))
    return p_slope - tl.where(x < 0, -q_slope, q_slope)
