"""Computing what is pending, without a trace in the random numbers.

[Note: random numbers of lazy tensors] With each ``torch_xla.sync``, torch_xla begins a new sequence of random numbers,
which follows from the state that was set last and not from where the sequence before had come to. So the numbers of a
training would depend on how often anything was computed: a save, a barrier, a log. And what ``get_rng_state`` returns
would not say how the numbers go on. Therefore whatever here computes sets the state again that there was before: the
sequence goes on, as that of PyTorch's generators does, and its state is one number, at any moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch_xla
from torch_xla.core import xla_model as xm


def compute() -> None:
    """Compute what was written down until now. Called on every rank, at the same places."""
    with same_random_numbers():
        torch_xla.sync()


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """What is computed in this context leaves the random numbers of the device where they are."""
    state = xm.get_rng_state()
    try:
        yield
    finally:
        xm.set_rng_state(state)
