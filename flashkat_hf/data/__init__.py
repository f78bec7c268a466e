"""From a source of labelled images to a batch."""

from .sources import open_data

__all__ = ["open_data"]
