"""One folder on disk, or a published one: load a checkpoint, describe it, draw it, complete its code."""

from .loading import load_checkpoint

__all__ = ["load_checkpoint"]
