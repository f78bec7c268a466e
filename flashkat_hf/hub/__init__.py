"""From a folder to a commit on the Hub."""

from .publication import publish
from .upload import push

__all__ = ["publish", "push"]
