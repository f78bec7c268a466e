"""`import flashkat_hf.timm` registers FlashKAT with timm, for `timm.create_model`."""

from .foreign.timm_models import TimmFlashKAT

__all__ = ["TimmFlashKAT"]
