"""Signals in a worker of a loader. A scheduler sends them to every process of a job, and the rank is to decide."""

from __future__ import annotations

import os
import select
import signal
import threading
from types import FrameType

from fabric_core.supervisor.signals import ANNOUNCING, SIGTERM

_PATIENCE = 30.0  # seconds that the rank has for its last steps


def leave_the_end_to_the_rank() -> None:
    """Go on loading when an end is announced, until the rank needs no more. Called in a worker's main thread.

    A worker that ended at once would make the rank fail, which was about to save. SIGTERM is also what the rank ends a
    worker by that hangs, and the sender is not known; so the first starts a clock, and the second ends the worker. That
    takes a thread, because no handler of Python's runs while the main thread hangs.
    """
    if os.name != "posix":
        return
    for signum in ANNOUNCING:
        signal.signal(signum, signal.SIG_IGN)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(SIGTERM, _ignore)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_in_time, args=(reader,), name="fabric-worker-signals", daemon=True).start()


def _end_in_time(reader: int) -> None:
    _wait_for_sigterm(reader, None)
    _wait_for_sigterm(reader, _PATIENCE)
    os._exit(0)


def _wait_for_sigterm(reader: int, patience: float | None) -> None:
    """Wait until the number of that signal comes; those of others start the waiting anew."""
    while select.select([reader], [], [], patience)[0]:
        if os.read(reader, 1)[0] == SIGTERM:
            return


def _ignore(_: int, __: FrameType | None) -> None:
    """Unlike ``SIG_IGN``, not inherited by programs that the worker starts."""
