"""The formula of `reference.py` in Triton: functions on values in registers, shared by every kernel."""

try:  # transformers takes what checkpoint code imports elsewhere for a requirement
    import triton
    import triton.language as tl
except ImportError:
    raise


@triton.jit
def load_numerator(row_ptr):
    """Load a_0..a_5 in float32; `row_ptr` may be a tensor of pointers."""
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
    """Load |b_1|..|b_4| in float32; `row_ptr` may be a tensor of pointers."""
    return (
        tl.abs(tl.load(row_ptr).to(tl.float32)),
        tl.abs(tl.load(row_ptr + 1).to(tl.float32)),
        tl.abs(tl.load(row_ptr + 2).to(tl.float32)),
        tl.abs(tl.load(row_ptr + 3).to(tl.float32)),
    )


@triton.jit
def inverse(q):
    """Return 1 / q for q >= 1.

    The fast root's square and one step of Newton's, in half the instructions of a division.
    """
    root = tl.rsqrt(q)
    reciprocal = root * root
    return reciprocal + reciprocal * (1.0 - q * reciprocal)


@triton.jit
def quotient(x, a, b):
    """Return P(x) / Q(x) by Horner's rule; Q >= 1, so there is no pole.

    P(x) = a0 + a1 x + ... + a5 x^5            a: six values, constant term first
    Q(x) = 1 + b1 |x| + ... + b4 |x|^4         b: four values >= 0
    """
    u = tl.abs(x)
    p = a[0] + x * (a[1] + x * (a[2] + x * (a[3] + x * (a[4] + x * a[5]))))
    q = 1.0 + u * (b[0] + u * (b[1] + u * (b[2] + u * b[3])))
    return p * inverse(q)


@triton.jit
def quotient_and_slope(x, a, b):
    """Return f = P / Q, 1 / Q, and Q dF/dx = P'(x) - F s(x) Q'(|x|) with s(0) = +1.

    Horner's rule gives a polynomial and its derivative in one pass, without coefficients of their own.
    """
    u = tl.abs(x)
    p, p_slope = a[4] + x * a[5], a[5]
    q, q_slope = b[2] + u * b[3], b[3]
    p, p_slope = a[3] + x * p, p + x * p_slope
    p, p_slope = a[2] + x * p, p + x * p_slope
    q, q_slope = b[1] + u * q, q + u * q_slope
    p, p_slope = a[1] + x * p, p + x * p_slope
    q, q_slope = b[0] + u * q, q + u * q_slope
    p, p_slope = a[0] + x * p, p + x * p_slope
    q, q_slope = 1.0 + u * q, q + u * q_slope
    reciprocal = inverse(q)
    f = p * reciprocal
    q_slope *= f
    return f, reciprocal, p_slope - tl.where(x < 0, -q_slope, q_slope)


@triton.jit
def no_sums(SEGMENTS: tl.constexpr):
    """Return ten zeros for each segment, the sums for a_0..a_5 and |b_1|..|b_4|."""
    zero = tl.zeros([SEGMENTS], tl.float32)
    return zero, zero, zero, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def add_coefficient_terms(sums, x, u, f, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr):
    """Return `sums` with the terms of a tile (SEGMENTS, WIDTH) added; u = grad_y / Q(x), f = P(x) / Q(x).

    a_k adds u x^k, |b_k| subtracts u f |x|^k: a fused multiply-add each, one after the other in a thread,
    where a reduction's tree would need a product and a sum.
    """
    xs, us = unstack(x, SEGMENTS, WIDTH), unstack(u, SEGMENTS, WIDTH)
    vs = unstack(u * f, SEGMENTS, WIDTH)
    for i in tl.static_range(WIDTH):
        x, u, v = xs[i], us[i], vs[i]
        x2 = x * x
        x3, x4 = x2 * x, x2 * x2
        sums = (
            sums[0] + u,
            sums[1] + u * x,
            sums[2] + u * x2,
            sums[3] + u * x3,
            sums[4] + u * x4,
            sums[5] + u * (x4 * x),
            sums[6] - v * tl.abs(x),
            sums[7] - v * x2,
            sums[8] - v * tl.abs(x3),
            sums[9] - v * x4,
        )
    return sums


@triton.jit
def unstack(x, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the columns of a tile (SEGMENTS, WIDTH), WIDTH a power of two.

    Where a thread holds a row, nothing moves.
    """
    if WIDTH == 1:
        return (x.reshape(SEGMENTS),)
    elif WIDTH == 2:
        return tl.split(x)
    else:
        even, odd = tl.split(x.reshape(SEGMENTS, WIDTH // 2, 2))
        return unstack(even, SEGMENTS, WIDTH // 2) + unstack(odd, SEGMENTS, WIDTH // 2)


@triton.jit
def store_sums(ptr, stride, sums, mask):
    """Store each of the ten sums `stride` behind the one before."""
    for k in tl.static_range(10):
        tl.store(ptr + k * stride, sums[k], mask=mask)
