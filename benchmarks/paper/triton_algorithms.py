"""The two algorithms of the FlashKAT paper in Triton, written from its text; both compute in float32.

They share the forward pass and differ in how the backward pass adds up the coefficients' gradients:
algorithm 1 (KAT) by an atomic addition for each element and coefficient, algorithm 2 (FlashKAT) by sums
inside a block and one atomic addition for each block and coefficient. `repeats` does the arithmetic several
times over and changes no result, as in the paper's table 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, ROWS, COLUMNS = 256, 64, 64  # elements of a block of algorithm 1; tile of a block of algorithm 2


@triton.jit
def load_tables(numerator_ptr, denominator_ptr, group):
    """Load six numerator coefficients, and four denominator coefficients with their signs."""
    a, b = numerator_ptr + group * 6, denominator_ptr + group * 4
    a = (tl.load(a), tl.load(a + 1), tl.load(a + 2), tl.load(a + 3), tl.load(a + 4), tl.load(a + 5))
    return a, (tl.load(b), tl.load(b + 1), tl.load(b + 2), tl.load(b + 3))


@triton.jit
def polynomials(x, a, b):
    """Compute P(x) = a0 + a1 x + ... + a5 x^5 and Q(x) = 1 + |b1||x| + ... + |b4||x|^4."""
    u = tl.abs(x)
    p = a[0] + x * (a[1] + x * (a[2] + x * (a[3] + x * (a[4] + x * a[5]))))
    q = 1.0 + u * (tl.abs(b[0]) + u * (tl.abs(b[1]) + u * (tl.abs(b[2]) + u * tl.abs(b[3]))))
    return p, q


@triton.jit
def gradients(x, grad_y, a, b):
    """Compute the gradient of x, and one element's terms of the ten coefficients' gradients.

    The sign of zero counts as +1, for x and for b.
    """
    p, q = polynomials(x, a, b)
    u = tl.abs(x)
    p_slope = a[1] + x * (2.0 * a[2] + x * (3.0 * a[3] + x * (4.0 * a[4] + x * (5.0 * a[5]))))
    q_slope = tl.abs(b[0]) + u * (2.0 * tl.abs(b[1]) + u * (3.0 * tl.abs(b[2]) + u * (4.0 * tl.abs(b[3]))))
    q_slope = tl.where(x < 0, -q_slope, q_slope)
    f, w = p / q, grad_y / q
    v = -w * f * u
    x2 = x * x
    x3, x4 = x2 * x, x2 * x2
    terms = (
        w,
        w * x,
        w * x2,
        w * x3,
        w * x4,
        w * (x4 * x),
        tl.where(b[0] < 0, -v, v),
        tl.where(b[1] < 0, -v, v) * u,
        tl.where(b[2] < 0, -v, v) * x2,
        tl.where(b[3] < 0, -v, v) * (x2 * u),
    )
    return w * (p_slope - f * q_slope), terms


@triton.jit
def repeated_gradients(x, grad_y, a, b, REPEATS: tl.constexpr):
    """Compute the same REPEATS times; each time depends on the one before, so that none is left out."""
    shift = x * 0.0
    for _ in range(REPEATS - 1):
        grad_x, t = gradients(x + shift, grad_y, a, b)
        total = t[0] + t[1] + t[2] + t[3] + t[4] + t[5] + t[6] + t[7] + t[8] + t[9]
        shift = (grad_x + total) * 0.0
    return gradients(x + shift, grad_y, a, b)


@triton.jit
def marker_kernel(out_ptr):
    """Write a number; in a list of kernels this parts one case from the next."""
    tl.store(out_ptr, 1.0)


@triton.jit
def forward_kernel(
    x_ptr,  # (num_elements,) float32, contiguous
    numerator_ptr,  # (num_groups, 6) float32
    denominator_ptr,  # (num_groups, 4) float32
    y_ptr,  # like x
    num_elements,
    hidden_size,
    group_size,
    SIZE: tl.constexpr,
    REPEATS: tl.constexpr,
):
    """Compute y = P(x) / Q(x), a thread an element; each thread reads its group's ten coefficients."""
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = index < num_elements
    a, b = load_tables(numerator_ptr, denominator_ptr, index % hidden_size // group_size)
    x = tl.load(x_ptr + index, mask=mask, other=0.0)
    shift = x * 0.0
    for _ in range(REPEATS - 1):
        p, q = polynomials(x + shift, a, b)
        shift = p / q * 0.0
    p, q = polynomials(x + shift, a, b)
    tl.store(y_ptr + index, p / q, mask=mask)


@triton.jit
def algorithm1_backward_kernel(
    grad_y_ptr,  # (num_elements,) float32, contiguous
    x_ptr,  # like grad_y
    numerator_ptr,  # (num_groups, 6) float32
    denominator_ptr,  # (num_groups, 4) float32
    grad_x_ptr,  # like x
    grad_numerator_ptr,  # (num_groups, 6) float32, zeros
    grad_denominator_ptr,  # (num_groups, 4) float32, zeros
    num_elements,
    hidden_size,
    group_size,
    SIZE: tl.constexpr,
    REPEATS: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Compute an element a thread; its ten terms go to memory by ten atomic additions."""
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = index < num_elements
    group = index % hidden_size // group_size
    a, b = load_tables(numerator_ptr, denominator_ptr, group)
    x = tl.load(x_ptr + index, mask=mask, other=0.0)
    grad_y = tl.load(grad_y_ptr + index, mask=mask, other=0.0)
    grad_x, terms = repeated_gradients(x, grad_y, a, b, REPEATS)
    tl.store(grad_x_ptr + index, grad_x, mask=mask)
    for k in tl.static_range(6):
        tl.atomic_add(grad_numerator_ptr + group * 6 + k, terms[k], mask=mask, sem=ORDER)
    for k in tl.static_range(4):
        tl.atomic_add(grad_denominator_ptr + group * 4 + k, terms[6 + k], mask=mask, sem=ORDER)


@triton.jit
def algorithm2_backward_kernel(
    grad_y_ptr,  # (num_rows, hidden_size) float32, contiguous
    x_ptr,  # like grad_y
    numerator_ptr,  # (num_groups, 6) float32
    denominator_ptr,  # (num_groups, 4) float32
    grad_x_ptr,  # like x
    grad_numerator_ptr,  # (num_groups, 6) float32, zeros
    grad_denominator_ptr,  # (num_groups, 4) float32, zeros
    num_rows,
    hidden_size,
    group_size,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    REPEATS: tl.constexpr,
):
    """Block (i, g) adds up TILE_ROWS rows of group g, then adds to memory once for each coefficient.

    Grid (ceil(num_rows / TILE_ROWS), num_groups). The group's columns are met TILE_COLUMNS at a time.
    """
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    group = tl.program_id(1)
    a, b = load_tables(numerator_ptr, denominator_ptr, group)
    zero = tl.sum(tl.zeros([TILE_ROWS], dtype=tl.float32))
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    for start in range(0, group_size, TILE_COLUMNS):
        columns = start + tl.arange(0, TILE_COLUMNS)
        mask = (rows < num_rows)[:, None] & (columns < group_size)[None, :]
        offset = rows[:, None] * hidden_size + (group * group_size + columns)[None, :]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0)
        grad_y = tl.load(grad_y_ptr + offset, mask=mask, other=0.0)
        grad_x, t = repeated_gradients(x, grad_y, a, b, REPEATS)
        tl.store(grad_x_ptr + offset, grad_x, mask=mask)
        sums = (
            sums[0] + tl.sum(t[0]),
            sums[1] + tl.sum(t[1]),
            sums[2] + tl.sum(t[2]),
            sums[3] + tl.sum(t[3]),
            sums[4] + tl.sum(t[4]),
            sums[5] + tl.sum(t[5]),
            sums[6] + tl.sum(t[6]),
            sums[7] + tl.sum(t[7]),
            sums[8] + tl.sum(t[8]),
            sums[9] + tl.sum(t[9]),
        )
    for k in tl.static_range(6):
        tl.atomic_add(grad_numerator_ptr + group * 6 + k, sums[k])
    for k in tl.static_range(4):
        tl.atomic_add(grad_denominator_ptr + group * 4 + k, sums[6 + k])


def mark(device: torch.device) -> None:
    marker_kernel[(1,)](torch.empty(1, device=device))


def forward(x: Tensor, numerator: Tensor, denominator: Tensor, repeats: int = 1) -> Tensor:
    """Launch the forward pass of both algorithms.

    x is contiguous float32 of fewer than 2^31 elements, the tables have a row for each group.
    """
    y = torch.empty_like(x)
    forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
        x, numerator, denominator, y, *sizes(x, numerator), BLOCK, repeats, num_warps=BLOCK // 32
    )
    return y


def algorithm1(
    grad_y: Tensor,
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    repeats: int = 1,
    order: str = "acq_rel",
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward pass of KAT; `order` is Triton's default, "relaxed" what CUDA's atomicAdd has."""
    grad_x, *sums = torch.empty_like(x), torch.zeros_like(numerator), torch.zeros_like(denominator)
    algorithm1_backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
        grad_y, x, numerator, denominator, grad_x, *sums, *sizes(x, numerator), BLOCK, repeats, order,
        num_warps=BLOCK // 32,
    )  # fmt: skip
    return grad_x, sums[0], sums[1]


def algorithm2(
    grad_y: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, repeats: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward pass of FlashKAT."""
    grad_x, *sums = torch.empty_like(x), torch.zeros_like(numerator), torch.zeros_like(denominator)
    num_elements, hidden_size, group_size = sizes(x, numerator)
    num_rows = num_elements // hidden_size
    columns = min(COLUMNS, triton.next_power_of_2(group_size))
    algorithm2_backward_kernel[(triton.cdiv(num_rows, ROWS), len(numerator))](
        grad_y, x, numerator, denominator, grad_x, *sums, num_rows, hidden_size, group_size, ROWS, columns,
        repeats,
    )  # fmt: skip
    return grad_x, sums[0], sums[1]


def sizes(x: Tensor, numerator: Tensor) -> tuple[int, int, int]:
    """Return the elements, the channels, and the channels of a group."""
    return x.numel(), x.shape[-1], x.shape[-1] // len(numerator)
