"""Memory that is new, and is about to be filled."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, dtype

__all__ = ["for_a_while", "in_large_pages", "in_large_pages_at"]

WORTH_IT = 4 << 20
"""Bytes; less is not worth the calls."""

LARGE_PAGE = 2 << 20
"""Bytes; where they are larger, the calls only have the usual ones in place."""

DEAR = 5e-4
"""Seconds of processor time for a large page; it takes 0.2 ms where the memory is there."""

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, of Linux 5.14


def in_large_pages(tensor: Tensor) -> Tensor:
    """A plain tensor, just allocated, whose memory the system is asked to give in large pages if it is on the CPU.

    Memory that the system gives in pages of 4 KiB costs several times as much as the copy that fills it.
    """
    if tensor.device.type == "cpu":
        memory = tensor.untyped_storage()
        in_large_pages_at(memory.data_ptr(), memory.nbytes())
    return tensor


def in_large_pages_at(address: int, size: int) -> None:
    """The same for so many bytes at an address. It is advice: where the system takes none, nothing happens.

    Pages are taken one by one. The first one that is dear is the last one that this process asks for: a hypervisor that
    has taken free memory back gives it again so slowly that the usual pages, which are used again, are cheaper.
    """
    end = address + size
    begin = -(-address // LARGE_PAGE) * LARGE_PAGE
    while _pages.worth_it and size >= WORTH_IT and begin + LARGE_PAGE <= end:
        _pages.take(begin)
        begin += LARGE_PAGE


def for_a_while(numel: int, kind: dtype) -> Tensor:
    """A row of at least one element on the CPU, whose memory goes back to the system when nobody has it any more.

    What threads allocate in the usual way is kept for them, each its own.
    """
    import torch

    return torch.frombuffer(mmap.mmap(-1, numel * kind.itemsize), dtype=kind)


class _LargePages:
    """How this process asks for them.

    Attributes:
        worth_it: Whether to ask.
    """

    def __init__(self) -> None:
        self.worth_it = hasattr(mmap, "MADV_HUGEPAGE")  # on Linux only
        self._advise: Callable[[int, int, int], int] | None = None

    def take(self, begin: int) -> None:
        """Have one in place, and look at what it costs."""
        if self._advise is None:
            self._advise = ctypes.CDLL(None).madvise
            self._advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        begun = time.thread_time()
        self._advise(begin, LARGE_PAGE, mmap.MADV_HUGEPAGE)
        self._advise(begin, LARGE_PAGE, _POPULATE_WRITE)
        self.worth_it = time.thread_time() - begun < DEAR


_pages = _LargePages()
