"""From a recipe to the folder of a run."""

from typing import TYPE_CHECKING

from ..lazy import imported_at_first_use

if TYPE_CHECKING:
    from .run import train

__all__ = ["train"]
__getattr__ = imported_at_first_use(__name__, {"train": ".run"})
