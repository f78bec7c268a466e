"""The attention kernels for short sequences, by their launchers."""

import pytest
import torch
from helpers import INTERPRETED, KERNEL_DEVICES

from flashkat_hf.model.triton_attention import packed_attention_backward, packed_attention_forward

pytestmark = pytest.mark.parametrize("device", KERNEL_DEVICES)
DTYPES = (
    [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
)  # the interpreter cannot multiply bfloat16
SHAPES = [(2, 197, 3, 64), (1, 17, 2, 32), (2, 64, 1, 16), (1, 1, 1, 64), (1, 256, 1, 64), (0, 5, 2, 16)]
SHAPES += [(2, 130, 2, 32), (1, 90, 2, 16)]  # whole blocks and a rest, of both sizes
SHAPES += [(1, 577, 1, 32)]  # of an image of 384 pixels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_gradient_and_column_sums(shape, dtype, device):
    batch, num_tokens, num_heads, head_dim = shape
    hidden_size, scale = num_heads * head_dim, head_dim**-0.5
    qkv = torch.randn(batch, num_tokens, 3 * hidden_size, device=device).to(dtype)
    grad_y = torch.randn(batch, num_tokens, hidden_size, device=device).to(dtype)
    y, lse = packed_attention_forward(qkv, num_heads, scale)
    grad_qkv, columns = packed_attention_backward(grad_y, qkv, y, lse, scale)

    # on the CPU: in a fresh process on a GPU, PyTorch 2.11 warns of cuBLAS in autograd's thread
    leaf = qkv.cpu().double().requires_grad_()
    query, key, value = leaf.unflatten(-1, (3, num_heads, head_dim)).permute(2, 0, 3, 1, 4).unbind()
    exact = ((query @ key.mT) * scale).softmax(-1) @ value
    exact = exact.transpose(1, 2).flatten(2)
    (exact_grad,) = torch.autograd.grad(exact, leaf, grad_y.cpu().double())
    for actual, true in ((y, exact), (grad_qkv, exact_grad), (columns, exact_grad.sum((0, 1)))):
        assert actual.shape == true.shape
        error = (actual.cpu().double() - true).norm()
        # Factors of each product and the result are rounded to dtype: less than half an eps in the mean each.
        assert error <= torch.finfo(dtype).eps * true.norm(), f"{(error / true.norm()).item():.3g}"


def test_two_runs_agree_bit_for_bit(device):
    qkv, grad_y = (torch.randn(2, 197, width, device=device).to(torch.float16) for width in (3 * 128, 128))

    def run():
        y, lse = packed_attention_forward(qkv, 2, 0.125)
        return y, lse, *packed_attention_backward(grad_y, qkv, y, lse, 0.125)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_large_scores(device):
    """Scores may lie far beyond what float16's exponentials hold: each row's maximum is subtracted first."""
    qkv = torch.randn(1, 20, 3 * 32, device=device).to(torch.float16)
    qkv[..., :64] *= 30
    y, lse = packed_attention_forward(qkv, 2, 1.0)
    grad_qkv, columns = packed_attention_backward(y, qkv, y, lse, 1.0)
    assert all(tensor.isfinite().all() for tensor in (y, lse, grad_qkv, columns))
