"""The learned functions of a model, from Python; the code is in checkpoints/functions.py."""

from .checkpoints.functions import LearnedFunction, model_functions

__all__ = ["LearnedFunction", "model_functions"]
