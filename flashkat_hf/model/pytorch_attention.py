"""PyTorch's attention on the product that holds q, k and v: forward and backward without nodes of autograd.

A block that is one node itself calls them where a sequence is too long for our kernel.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

FLASH, CUDNN, MATH = (
    backend.value for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
)
ATEN = torch.ops.aten
FORWARD = {FLASH: ATEN._scaled_dot_product_flash_attention, CUDNN: ATEN._scaled_dot_product_cudnn_attention}


class Attended(NamedTuple):
    """Tensors that backward needs beside q, k, v and the result; without them it computes attention again."""

    # float32 log-sum-exp: (batch, heads, tokens) by flash attention, (batch, heads, tokens, 1) by cuDNN
    lse: Tensor | None = None
    seed: Tensor | None = None  # this and the next: dropout's random state, which the backends ask for
    offset: Tensor | None = None


def attention_forward(
    qkv: Tensor, num_heads: int, scale: float, backend: int | None = None
) -> tuple[Tensor, Attended]:
    """Compute self-attention by one of PyTorch's backends.

    Args:
        qkv: `(batch, num_tokens, 3 * hidden_size)`, contiguous.
        num_heads: heads.
        scale: factor of the scores.
        backend: a value of `SDPBackend`; None: PyTorch chooses.

    Returns:
        `(batch, num_tokens, hidden_size)`, contiguous, and what backward needs.
    """
    q, k, v = heads(qkv, num_heads)
    if backend is None:
        chosen = qkv.is_cuda and q.shape[-1] % 8 == 0
        backend = ATEN._fused_sdp_choice(q, k, v, scale=scale) if chosen else MATH
    if backend in FORWARD:
        options = {"attn_bias": None, "compute_log_sumexp": True} if backend == CUDNN else {}
        y, lse, _, _, _, _, seed, offset, _ = FORWARD[backend](q, k, v, **options, scale=scale)
        attended = Attended(lse, seed, offset)
    else:
        y, attended = scaled_dot_product_attention(q, k, v, scale=scale), Attended()
    return y.transpose(1, 2).reshape(*qkv.shape[:2], -1), attended


def attention_backward(
    grad_y: Tensor, qkv: Tensor, y: Tensor, attended: Attended, num_heads: int, scale: float
) -> Tensor:
    """Return the gradient of qkv, like qkv; `grad_y` and `y` are contiguous, of as many elements each."""
    q, k, v = heads(qkv, num_heads)
    batch, _, num_tokens, head_dim = q.shape
    y, grad_y = (
        tensor.view(batch, num_tokens, num_heads, head_dim).transpose(1, 2) for tensor in (y, grad_y)
    )
    lse, *random = attended
    lengths = None, None, num_tokens, num_tokens  # of sequences of unequal lengths; the longest ones
    rest = 0.0, False  # no dropout, not causal
    if lse is None:
        with torch.enable_grad():
            q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
            result = scaled_dot_product_attention(q, k, v, scale=scale)
        grads = torch.autograd.grad(result, (q, k, v), grad_y)
    elif lse.ndim == 3:
        tensors = grad_y, q, k, v, y, lse
        grads = ATEN._scaled_dot_product_flash_attention_backward(
            *tensors, *lengths, *rest, *random, scale=scale
        )
    else:
        tensors = grad_y, q, k, v, y, lse
        grads = ATEN._scaled_dot_product_cudnn_attention_backward(
            *tensors, *random, None, *lengths, *rest, scale=scale
        )
    return torch.stack([grad.transpose(1, 2) for grad in grads], 2).view(qkv.shape)


def heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Return q, k and v, each `(batch, num_heads, num_tokens, head_dim)`, as views."""
    return qkv.view(*qkv.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind()
