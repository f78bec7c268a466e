"""From a folder to a commit on the Hub."""

from .upload import publish, push

__all__ = ["publish", "push"]
