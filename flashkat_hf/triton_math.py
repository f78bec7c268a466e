"""The formula of `reference.py` in Triton: functions on values in registers, shared by every kernel."""

try:  # transformers takes what checkpoint code imports elsewhere for a requirement
    import triton
    import triton.language as tl
except ImportError:
    raise


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
    root = tl.rsqrt(q)  # its square is 1 / q to two roundings, in half the instructions of a division
    reciprocal = root * root
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


@triton.jit
def no_sums(like):
    """Ten zeros of the shape of `like`, for `add_coefficient_terms`: the sums for a_0..a_5 and |b_1|..|b_4|."""
    zero = tl.zeros_like(like)
    return zero, zero, zero, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def add_coefficient_terms(sums, x, u, f):
    """`sums` with the terms of a tile (segments, WIDTH) added; u = grad_y / Q(x), f = P(x) / Q(x).

    a_k adds u x^k, |b_k| subtracts u f |x|^k.
    """
    v = u * f
    x2 = x * x
    x3, x4 = x2 * x, x2 * x2
    return (
        sums[0] + tl.sum(u, 1),
        sums[1] + tl.sum(u * x, 1),
        sums[2] + tl.sum(u * x2, 1),
        sums[3] + tl.sum(u * x3, 1),
        sums[4] + tl.sum(u * x4, 1),
        sums[5] + tl.sum(u * (x4 * x), 1),
        sums[6] - tl.sum(v * tl.abs(x), 1),
        sums[7] - tl.sum(v * x2, 1),
        sums[8] - tl.sum(v * tl.abs(x3), 1),
        sums[9] - tl.sum(v * x4, 1),
    )


@triton.jit
def store_sums(ptr, stride, sums, mask):
    """Each of the ten sums `stride` behind the one before."""
    for k in tl.static_range(10):
        tl.store(ptr + k * stride, sums[k], mask=mask)
