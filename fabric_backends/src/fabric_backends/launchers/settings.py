"""The random streams, defaults and flags of the parent, for its new processes.

A fork has most of them, but Python reseeds its own generator there; a fresh interpreter has none.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def _set_cudnn(deterministic: bool, benchmark: bool) -> None:
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = benchmark


# Each: how to read it, and how to set it.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.initial_seed, torch.manual_seed),  # of every device
    (
        lambda: torch.get_rng_state().tolist(),
        lambda state: torch.set_rng_state(torch.tensor(state, dtype=torch.uint8)),
    ),
    (random.getstate, random.setstate),
    (torch.get_default_dtype, torch.set_default_dtype),
    (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda flags: torch.use_deterministic_algorithms(flags[0], warn_only=flags[1]),
    ),
    (
        lambda: (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        lambda flags: _set_cudnn(*flags),
    ),
)


@dataclass(frozen=True)
class Settings:
    """Random streams, defaults and flags, as they were in the parent."""

    values: tuple[Any, ...]
    numpy: Any
    threads: int

    @classmethod
    def of_this_process(cls) -> Settings:
        """Read them."""
        numpy = sys.modules.get("numpy")
        values = tuple(read() for read, _ in _SETTINGS)
        return cls(values, numpy and numpy.random.get_state(), torch.get_num_threads())

    def apply(self, most_threads: int) -> None:
        """Set them, with as many threads as the parent had, but at most ``most_threads``."""
        for (read, write), value in zip(_SETTINGS, self.values, strict=True):
            if read() != value:  # some are slow to set: they import half of PyTorch
                write(value)
        if self.numpy is not None:
            import numpy

            numpy.random.set_state(self.numpy)
        torch.set_num_threads(min(self.threads, most_threads))
