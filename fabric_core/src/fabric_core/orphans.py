"""Processes that must not outlive the process that started them, and processes that get another parent.

On Linux the kernel does both: a parent-death signal ends even a stopped process, and whoever asks for it becomes the
parent of orphans among its descendants. Elsewhere a thread looks for the parent, and nobody can adopt.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["adopting", "can_adopt", "die_with_parent"]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_LOOK_EVERY = 0.5  # seconds


def die_with_parent(parent_pid: int | None = None) -> None:
    """Let this process be killed as soon as its parent is gone, however the parent ends.

    Called first in a started process: a rank, a worker of a data loader. The process gets SIGKILL, because
    whoever would have waited for an orderly end is dead. Its own children are not covered: each has to call this.
    Nothing is done on Windows.

    Two limits of the kernel: "parent" is the *thread* that started this process, so that thread must last as
    long as the process; and the request belongs to the calling thread, so call this from the main thread.

    Args:
        parent_pid: The process to die with, as it called ``os.getpid()``. Give it whenever it is known: it
            closes the gap in which a parent dies before this call. The default is whoever is the parent now.
    """
    if sys.platform == "win32":
        return
    parent = os.getppid() if parent_pid is None else parent_pid
    armed = _ask_kernel()
    if os.getppid() == parent:
        if not armed:
            _look_until_gone(lambda: os.getppid() == parent)
    elif parent_pid is not None and _is_alive(parent):
        # Something stands between the two, such as a fork server: the kernel watches that, and we the parent.
        _look_until_gone(lambda: _is_alive(parent))
    else:
        _die()


def can_adopt() -> bool:
    """Whether this system gives orphans to a process that asks for them."""
    return _adopts() is not None


@contextmanager
def adopting() -> Iterator[None]:
    """Be the parent of every descendant that loses its own within the block.

    Whose parent this process has become stays its child, to be waited for, after the block.
    """
    before = _adopts()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, before or 0)


def _adopts() -> int | None:
    """Whether this process gets orphans at this moment, as the kernel writes it; ``None`` where nobody ever does."""
    try:
        import ctypes
    except ImportError:
        return None
    answer = ctypes.c_int(0)
    return answer.value if _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(answer)) else None


def _ask_kernel() -> bool:
    """Request the parent-death signal; whether the system knows such a thing."""
    return _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _prctl(option: int, argument: Any) -> bool:
    """Ask something of Linux for this process; whether it was done."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        import ctypes  # some builds of Python lack it

        return bool(ctypes.CDLL(None).prctl(option, argument, 0, 0, 0) == 0)
    except (ImportError, OSError, AttributeError):
        return False


def _look_until_gone(is_there: Callable[[], bool]) -> None:
    def look() -> None:
        while is_there():
            time.sleep(_LOOK_EVERY)
        _die()

    threading.Thread(target=look, name="fabric-die-with-parent", daemon=True).start()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Dead, but not yet waited for by its own parent, which may take for ever. Outside Linux unknown: no."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
