"""The group rational of Kolmogorov-Arnold transformers and its fused forms, in Triton and plain PyTorch."""

from . import layers
from .op_attention import packed_attention
from .op_norm_rational import add_norm_rational
from .op_rational import rational
from .op_rational_mlp import rational_mlp

__all__ = ["add_norm_rational", "layers", "packed_attention", "rational", "rational_mlp"]
