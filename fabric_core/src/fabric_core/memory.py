"""Memory that is new, and is about to be filled."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, dtype

__all__ = ["for_a_while", "in_large_pages", "in_large_pages_at"]

WORTH_IT = 4 << 20
"""Bytes; less is not worth the call."""


def in_large_pages(tensor: Tensor) -> Tensor:
    """A plain tensor, just allocated, whose memory the system is asked to give in large pages if it is on the CPU.

    Memory that the system gives in pages of 4 KiB costs several times as much as the copy that fills it.
    """
    if tensor.device.type == "cpu":
        memory = tensor.untyped_storage()
        in_large_pages_at(memory.data_ptr(), memory.nbytes())
    return tensor


def in_large_pages_at(address: int, size: int) -> None:
    """The same for so many bytes at an address. It is advice: where the system takes none, nothing happens."""
    if size >= WORTH_IT:
        begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        _advise()(begin, (address + size - begin) // mmap.PAGESIZE * mmap.PAGESIZE)


def for_a_while(numel: int, kind: dtype) -> Tensor:
    """A row of at least one element on the CPU, whose memory goes back to the system when nobody has it any more.

    What threads allocate in the usual way is kept for them, each its own.
    """
    import torch

    return torch.frombuffer(mmap.mmap(-1, numel * kind.itemsize), dtype=kind)


@functools.cache
def _advise() -> Callable[[int, int], object]:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # on Linux only
    if advice is None:
        return lambda begin, size: None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda begin, size: madvise(begin, size, advice)
