"""The end of a run in several processes: signals that are noted, and numbers that all processes agree on."""

import os
import signal
from types import FrameType
from typing import Any

import torch
from torch import distributed

CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopSignals:
    """A context that notes the first SIGTERM or Ctrl-C in `number`; a second Ctrl-C interrupts as usual."""

    def __init__(self):
        self.number = 0
        self.process = os.getpid()
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.handlers = {number: signal.signal(number, self._note) for number in CODES}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a process that was forked since: the main one decides
            return
        self.number = self.number or number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)


class Agreement:
    """A group of all processes that agrees on integers, without waiting for GPUs."""

    def __init__(self, num_processes: int):
        self.group: Any = distributed.new_group(backend="gloo") if num_processes > 1 else None

    def largest(self, *numbers: int) -> list[int]:
        """Return the largest value of each number over all processes."""
        if self.group is None:
            return list(numbers)
        values = torch.tensor(numbers)
        distributed.all_reduce(values, distributed.ReduceOp.MAX, group=self.group)
        return values.tolist()

    def any(self, number: int) -> int:
        """Return a number that is not 0 if it is not 0 in any process."""
        return self.largest(number)[0]
