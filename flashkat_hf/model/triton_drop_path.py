"""A Triton kernel that multiplies each sample's residual branch by a number, as stochastic depth does."""

import torch
from torch import Tensor

from .triton_launch import launch
from .triton_math import tl, triton
from .triton_tiles import segment_width

SEGMENTS, NUM_WARPS = 256, 2  # of a program, which takes as much as one of the rational's forward kernel


@triton.jit(do_not_specialize=("segments_per_sample",))
def scale_samples_kernel(
    branch_ptr,  # (num_samples, segments_per_sample * WIDTH), contiguous, any float
    factor_ptr,  # (2, num_samples) float32, of which the second row counts
    residual_ptr,  # like branch, any float; any tensor where not ADDS
    y_ptr,  # like branch, any float
    segments_per_sample: tl.int32,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Compute y = factor * branch, with ADDS residual + factor * branch.

    Grid (num_samples, ceil(segments_per_sample / SEGMENTS)). Memory: one or two reads and one write of each
    element. Arithmetic: float32.
    """
    sample = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1) * SEGMENTS + tl.arange(0, SEGMENTS)[:, None]
    offset = (sample * segments_per_sample + segment) * WIDTH + tl.arange(0, WIDTH)[None, :]
    factor = tl.load(factor_ptr + tl.num_programs(0) + sample)
    mask = segment < segments_per_sample
    y = factor * tl.load(branch_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        y += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


def scale_samples(
    branch: Tensor, factors: Tensor, residual: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Launch the kernel on the second branch of a block, or on its gradient.

    Args:
        branch: `(samples, ...)`, contiguous and not empty.
        factors: `(2, samples)` float32, contiguous, of both branches. A view of the second row would often
            not be aligned to 16 bytes, and Triton's own launches, which serve such tensors, are slower.
        residual: like the branch, contiguous; added if there is one.
        dtype: of the result; by default that of the sum of what is there.
    """
    summand = branch if residual is None else residual
    y = torch.empty_like(branch, dtype=dtype or torch.promote_types(branch.dtype, summand.dtype))
    size = branch[0].numel()
    width = segment_width(size, branch.element_size())
    segments = size // width
    grid = len(branch), triton.cdiv(segments, SEGMENTS), 1
    constants = SEGMENTS, width, residual is not None
    launch(scale_samples_kernel, grid, (branch, factors, summand, y), (segments,), constants, NUM_WARPS)
    return y
