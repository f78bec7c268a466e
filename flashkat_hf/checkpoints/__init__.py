"""One folder on disk: load a checkpoint, describe it, draw its functions, complete its code; published ones."""

from .loading import load_checkpoint

__all__ = ["load_checkpoint"]
