"""Random draws that are functions of a few numbers, such as (seed, epoch, position)."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch.utils.data import get_worker_info


def random_integer(*numbers: int) -> int:
    """Return a random integer of 64 bits that is a function of these numbers."""
    return int(numpy.random.SeedSequence(numbers).generate_state(1, numpy.uint64)[0])


def seed_generators(*numbers: int) -> None:
    """Seed random, numpy and torch, on every device, from these numbers."""
    words = numpy.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(words[0]))
    numpy.random.seed(words[1])
    torch.manual_seed(int(words[2]))


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed random, numpy and torch (CPU) from these numbers, and put their states back afterwards.

    In a worker process, where nothing else draws, the states stay as they are.
    """
    generator, states = torch.default_generator, None
    if not get_worker_info():
        states = random.getstate(), numpy.random.get_state(), generator.get_state()
    words = numpy.random.SeedSequence(numbers).generate_state(4)
    random.seed(int(words[0]) << 32 | int(words[1]))
    numpy.random.seed(words[2])
    generator.manual_seed(int(words[3]))  # torch.manual_seed would seed every GPU too
    try:
        yield
    finally:
        if states:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            generator.set_state(states[2])
