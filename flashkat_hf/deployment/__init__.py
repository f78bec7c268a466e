"""Models for other runtimes: exported, proved to compute the same, with what a program needs beside them."""

from ..lazy import imported_at_first_use

__getattr__ = imported_at_first_use(__name__, {"export_model": ".export"})
