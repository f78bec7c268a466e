"""From a source of labelled images to a batch."""

from typing import TYPE_CHECKING

from ..lazy import imported_at_first_use

if TYPE_CHECKING:
    from .sources import open_data

__all__ = ["open_data"]
__getattr__ = imported_at_first_use(__name__, {"open_data": ".sources"})
