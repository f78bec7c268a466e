"""One folder on disk, or a published one: load a checkpoint, describe it, draw it, complete its code."""

from typing import TYPE_CHECKING

from ..lazy import imported_at_first_use

if TYPE_CHECKING:
    from .loading import load_checkpoint

__all__ = ["load_checkpoint"]
__getattr__ = imported_at_first_use(__name__, {"load_checkpoint": ".loading"})
