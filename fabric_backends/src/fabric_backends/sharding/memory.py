"""Memory of the CPU that was freed, and that the C library keeps."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["give_back"]


def give_back(device: torch.device) -> None:
    """Give the system back what was freed since, on the CPU.

    Where a large tensor was freed behind which a smaller one lives on, as a layer and its shard, glibc keeps the gap
    and fills it badly: a rank that divides a model layer by layer would end up with as much as the whole model takes.

    Args:
        device: Where the tensors were.
    """
    if device.type == "cpu":
        _trim()(0)


@functools.cache
def _trim() -> Callable[[int], Any]:
    """``malloc_trim`` of glibc; other libraries give back by themselves."""
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    return trim or (lambda pad: None)
