"""From a folder to a commit on the Hub."""

from typing import TYPE_CHECKING

from ..lazy import imported_at_first_use

if TYPE_CHECKING:
    from .publication import publish
    from .upload import push

__all__ = ["publish", "push"]
__getattr__ = imported_at_first_use(__name__, {"publish": ".publication", "push": ".upload"})
