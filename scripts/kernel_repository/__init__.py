"""The group rational of Kolmogorov-Arnold transformers and its fused forms, in Triton and in plain PyTorch."""

from . import layers
from .fused_ops import add_norm_rational, packed_attention, rational_mlp
from .ops import rational

__all__ = ["add_norm_rational", "layers", "packed_attention", "rational", "rational_mlp"]
