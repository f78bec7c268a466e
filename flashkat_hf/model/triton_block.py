"""A whole block by its kernels and PyTorch's matrix products: a forward, a backward, one gathering of sums.

What backward's kernels sum up lies in one piece of memory, and one launch turns it into the gradients of all
tables, biases and norms. Weights are cast to the products' dtype together, their gradients likewise back.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .pytorch_attention import Attended, attention_backward, attention_forward
from .triton_attention import attention_scratch, launch_attention_backward, launch_attention_forward
from .triton_block_sums import gather_block_sums_kernel, gather_plan, in_lines
from .triton_drop_path import scale_samples
from .triton_launch import launch
from .triton_norm import launch_norm_backward, launch_norm_forward, row_plan
from .triton_norm_rational import (
    launch_norm_rational_backward,
    launch_norm_rational_forward,
    norm_rational_backward_plan,
)
from .triton_rational import backward_plan, rational_forward
from .triton_rational_mlp import launch_mlp_backward, linear_plan, rational_mlp_forward
from .triton_sums import NUM_WARPS
from .triton_tiles import NORM_BACKWARD


class Block(NamedTuple):
    """What a block computes with beside its input and its parameters."""

    num_heads: int
    scale: float  # of the scores
    packed: bool  # whether our kernel does the attention; else PyTorch does
    eps1: float
    eps2: float
    dtype: torch.dtype  # of the products
    factors: Tensor | None  # (2, batch) float32, of both branches; None: they are added as they are


class Parameters(NamedTuple):
    """A block's parameters, contiguous, on one device, of any dtype but float64.

    A block that begins behind its attention has none of the first four.
    """

    norm1_weight: Tensor | None
    norm1_bias: Tensor | None
    qkv_weight: Tensor | None
    qkv_bias: Tensor | None  # may be missing alone
    proj_weight: Tensor
    proj_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    numerator1: Tensor
    denominator1: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    numerator2: Tensor
    denominator2: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


class Head(NamedTuple):
    """What backward needs of norm1 and attention."""

    x: Tensor
    normed: Tensor  # in the products' dtype, as qkv and its weight
    qkv: Tensor
    mean: Tensor  # float32, as the next one
    rstd: Tensor
    lse: Tensor | None  # this and the next two: `Attended`; our kernel has the first alone
    seed: Tensor | None
    offset: Tensor | None
    qkv_weight: Tensor
    norm_weight: Tensor


class Tail(NamedTuple):
    """What backward needs of the rest."""

    total: Tensor  # in x's dtype
    mixed: Tensor  # in the products' dtype, as all but the statistics and parameters
    act: Tensor
    product: Tensor
    mean: Tensor  # float32, as the next one
    rstd: Tensor
    proj_weight: Tensor
    fc1_weight: Tensor
    fc2_weight: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    numerator1: Tensor
    denominator1: Tensor
    numerator2: Tensor
    denominator2: Tensor


def block_forward(
    x: Tensor, mixed: Tensor | None, parameters: Parameters, block: Block, keep: bool
) -> tuple[Tensor, Head | None, Tail | None]:
    """Compute a block.

    Args:
        x: the residual stream `(batch, num_tokens, hidden_size)`, contiguous, and not empty.
        mixed: what the heads made of norm1's tokens, like x, in the products' dtype; None: that is still to
            do, and the products are in half precision.
        parameters: of the block.
        block: what else there is to know.
        keep: whether backward is to come.

    Returns:
        The block's output, and with `keep` what backward needs; no `Head` where `mixed` is given.
    """
    p, rows, hidden_size = parameters, x.shape[0] * x.shape[1], x.shape[2]
    weights = p.qkv_weight, p.proj_weight, p.fc1_weight, p.fc2_weight
    biases = p.qkv_bias, p.proj_bias, p.fc1_bias, p.fc2_bias
    qkv_weight, proj_weight, fc1_weight, fc2_weight, *biases = cast((*weights, *biases), block.dtype)
    scores = rows * block.num_heads if block.packed else 0
    statistics = pieces(x, torch.float32, (rows, rows, rows, rows, scores))
    mean1, rstd1, mean2, rstd2, lse = statistics
    head = None
    if mixed is None:
        normed = torch.empty_like(x, dtype=block.dtype)
        launch_norm_forward(x, p.norm1_weight, p.norm1_bias, normed, mean1, rstd1, eps=block.eps1)
        qkv = linear(normed, qkv_weight, biases[0])
        if block.packed:
            mixed, attended = torch.empty_like(normed), Attended(lse.view(x.shape[0], -1, x.shape[1]))
            launch_attention_forward(qkv, mixed, attended.lse, block.scale)
        else:
            mixed, attended = attention_forward(qkv, block.num_heads, block.scale)
        if keep:
            head = Head(x, normed, qkv, mean1, rstd1, *attended, qkv_weight, p.norm1_weight)
        del normed, qkv
    branch = linear(mixed, proj_weight, biases[1])
    total, act = torch.empty_like(x), torch.empty_like(x, dtype=block.dtype)
    norm = p.norm2_weight, p.norm2_bias
    table1, table2 = (p.numerator1, p.denominator1), (p.numerator2, p.denominator2)
    tensors = x, branch, *norm, *table1, total, act, mean2, rstd2
    launch_norm_rational_forward(*tensors, eps=block.eps2, factors=block.factors)
    del branch, tensors
    table_rows = table2[0].shape[0], table2[1].shape[0]
    if block.dtype.itemsize == 2 and linear_plan(rows, hidden_size, p.fc1_weight.shape[0], *table_rows):
        hidden, product = rational_mlp_forward(act, fc1_weight, p.fc1_bias, *table2, keep)
    else:
        product = linear(act, fc1_weight, biases[2])
        hidden = rational_forward(product, *table2)
    branch = linear(hidden, fc2_weight, biases[3])
    y = total + branch if block.factors is None else scale_samples(branch, block.factors, total)
    if not keep:
        return y, None, None
    weights = proj_weight, fc1_weight, fc2_weight
    return y, head, Tail(total, mixed, act, product, mean2, rstd2, *weights, *norm, *table1, *table2)


def block_backward(
    grad: Tensor,
    head: Head | None,
    tail: Tail,
    block: Block,
    dtypes: Sequence[torch.dtype | None],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Compute a block's gradients.

    Args:
        grad: of the block's output, contiguous.
        head: from `block_forward`.
        tail: likewise.
        block: as there.
        dtypes: of the parameters; None for one that there is not.
        wanted: which parameters need a gradient; a weight that does not gets none.

    Returns:
        The gradient of x, that of `mixed` where it was given, and those of `Parameters`.
    """
    hidden_size, inner_size = tail.act.shape[-1], tail.product.shape[-1]
    tables = tail.numerator1, tail.denominator1, tail.numerator2, tail.denominator2
    mlp_plan = backward_plan(tail.product, *tables[2:])
    norm2_plan = norm_rational_backward_plan(tail.total, *tables[:2], totals=True)
    norm1_plan, head_sizes = None, (0, 0, 0, 0, 0)
    if head is not None:
        norm1_plan = row_plan(head.x, hidden_size, NORM_BACKWARD)
        norm1_rows = norm1_plan[0].num_programs * norm1_plan[0].rows
        batch, num_tokens, _ = head.x.shape
        attention_sizes = 1, 0, 0, 3 * hidden_size
        if block.packed:
            attention_sizes = attention_scratch(batch, block.num_heads, num_tokens, hidden_size)
        head_sizes = norm1_rows, *attention_sizes
    plan = gather_plan(
        *(hidden_size, inner_size, mlp_plan[2], mlp_plan[1][1]),
        *(norm2_plan[0].num_programs * norm2_plan[0].rows, norm2_plan[1][1], *head_sizes),
        *[table.shape[0] for table in tables],
    )
    scratch = tail.total.new_empty(plan.scratch.size, dtype=torch.float32)
    partial1, partial2, columns2, columns_fc1, *of_head = plan.scratch.cut(scratch)
    sums_of_tail = (partial1, columns2), (partial2, columns_fc1)
    plans = norm2_plan, mlp_plan
    grad, grad_mixed, *products = tail_backward(grad, tail, block, wanted, plans, sums_of_tail)
    if head is None:
        grad_mixed, products = grad_mixed.view_as(tail.mixed), [None, *products]
    else:
        grad, product = head_backward(grad, grad_mixed, head, tail.mixed, block, wanted, norm1_plan, of_head)
        grad_mixed, products = None, [product, *products]
    sums = tail.total.new_empty(plan.sums.size, dtype=torch.float32)
    tensors = scratch, tail.denominator1, tail.denominator2, sums
    launch(gather_block_sums_kernel, (plan.programs, 1, 1), tensors, plan.numbers, plan.constants, NUM_WARPS)
    grads = plan.sums.cut(sums)
    numerator1, denominator1, numerator2, denominator2 = map(Tensor.view_as, grads[:4], tables)
    norm2_weight, norm2_bias, proj_bias, fc2_bias, fc1_bias, *of_head = grads[4:]
    qkv_bias, *norm1 = of_head or (None, None, None)
    qkv_weight, proj_weight, fc1_weight, fc2_weight = cast(products, dtypes[14])
    gradients = Parameters(
        *(*norm1, qkv_weight, qkv_bias, proj_weight, proj_bias, norm2_weight, norm2_bias),
        *(numerator1, denominator1, fc1_weight, fc1_bias, numerator2, denominator2, fc2_weight, fc2_bias),
    )
    return (
        grad,
        grad_mixed,
        [
            None if dtype is None else grad if grad is None or grad.dtype == dtype else grad.to(dtype)
            for grad, dtype in zip(gradients, dtypes, strict=True)
        ],
    )


def tail_backward(
    grad: Tensor, tail: Tail, block: Block, wanted: Sequence[bool], plans: tuple, sums: tuple
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of `total`, of `mixed`, and of the weights of proj, fc1 and fc2."""
    t, rows, hidden_size = tail, grad.shape[0] * grad.shape[1], grad.shape[2]
    dtype, factors = block.dtype, block.factors
    branch = grad.to(dtype) if factors is None else scale_samples(grad, factors, dtype=dtype)
    grad_rows = branch.view(rows, hidden_size)
    act, mixed = t.act.view(rows, hidden_size), t.mixed.view(rows, hidden_size)
    grad_hidden = grad_rows.mm(t.fc2_weight)
    grad_product, hidden = torch.empty_like(grad_hidden), torch.empty_like(grad_hidden)
    table1, table2 = (t.numerator1, t.denominator1), (t.numerator2, t.denominator2)
    launch_mlp_backward(grad_hidden, t.product, *table2, grad_product, hidden, *sums[1], plan=plans[1])
    del grad_hidden
    fc2_weight = grad_rows.t().mm(hidden) if wanted[14] else None
    del hidden
    fc1_weight = grad_product.t().mm(act) if wanted[10] else None
    grad_act, grad_total = grad_product.mm(t.fc1_weight), torch.empty_like(t.total)
    del grad_product
    norm = t.mean, t.rstd, t.norm_weight, t.norm_bias
    inputs = grad, grad_act, t.total, *norm, *table1
    scaled = None if factors is None else (factors, torch.empty_like(grad_total, dtype=dtype))
    launch_norm_rational_backward(*inputs, grad_total, *sums[0], plan=plans[0], totals=True, scaled=scaled)
    branch = grad_total.to(dtype) if scaled is None else scaled[1]
    grad_rows = branch.view(rows, hidden_size)
    proj_weight = grad_rows.t().mm(mixed) if wanted[4] else None
    return grad_total, grad_rows.mm(t.proj_weight), proj_weight, fc1_weight, fc2_weight


def head_backward(
    grad: Tensor,
    grad_mixed: Tensor,
    head: Head,
    mixed: Tensor,
    block: Block,
    wanted: Sequence[bool],
    norm_plan: tuple,
    sums: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Write x's gradient over that of `total`, and return it and the gradient of qkv's weight."""
    rows, hidden_size = grad_mixed.shape
    columns_qkv, columns_norm, *scratch = sums
    if block.packed:
        grad_qkv = torch.empty_like(head.qkv)
        tensors = grad_mixed, head.qkv, mixed, head.lse, grad_qkv, *scratch, columns_qkv
        launch_attention_backward(*tensors, scale=block.scale)
        grad_qkv = grad_qkv.view(rows, 3 * hidden_size)
    else:
        attended = Attended(head.lse, head.seed, head.offset)
        inputs = grad_mixed, head.qkv, mixed, attended, block.num_heads, block.scale
        grad_qkv = attention_backward(*inputs).view(rows, 3 * hidden_size)
        torch.sum(grad_qkv, 0, dtype=torch.float32, out=columns_qkv)
    weight = grad_qkv.t().mm(head.normed.view(rows, hidden_size)) if wanted[2] else None
    inputs = grad, grad_qkv.mm(head.qkv_weight), head.x, head.mean, head.rstd, head.norm_weight
    launch_norm_backward(*inputs, grad, columns_norm, plan=norm_plan)  # a row is read before it is written
    return grad, weight


def cast(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Return tensors in `dtype`; those that are not yet are copied by one launch, into one allocation."""
    others = [tensor for tensor in tensors if tensor is not None and tensor.dtype != dtype]
    if not others:
        return list(tensors)
    copies = pieces(others[0], dtype, [*map(Tensor.numel, others)])
    copies = [*map(Tensor.view_as, copies, others)]
    torch._foreach_copy_(copies, others)
    copy = iter(copies)
    return [tensor if tensor is None or tensor.dtype == dtype else next(copy) for tensor in tensors]


def pieces(like: Tensor, dtype: torch.dtype, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Return flat tensors of these sizes, pieces of one allocation that is made as `like` was."""
    layout = in_lines(dtype.itemsize, *sizes)
    return layout.cut(like.new_empty(layout.size, dtype=dtype))
