"""From a recipe to the folder of a run."""

from .run import train

__all__ = ["train"]
