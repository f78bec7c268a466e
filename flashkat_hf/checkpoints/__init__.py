"""One folder on disk: load a checkpoint, describe it, draw its functions, complete its code.

Published checkpoints.
"""

from .loading import load_checkpoint

__all__ = ["load_checkpoint"]
