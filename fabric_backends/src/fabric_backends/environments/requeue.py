"""Being told that the job is about to be stopped, and having it started again.

[Note: requeue] The order to requeue stops the job at once, so it must not come before the loop has saved. A signal
handler can neither save (the ranks are at different places) nor talk to the other ranks. So it notes the wish and
starts a clock. Whoever polls saves, ends its loop and closes: the order is given then. For a loop that does not poll,
it is given when the clock runs out, and the job goes on from its last checkpoint.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any


class Requeue:
    """Hears a signal, and gives an order once.

    Args:
        signum: The signal.
        order: Has the job started again; called at most once, in any thread. ``None`` where somebody else does it.
        grace: Seconds from the signal until the order is given in any case.
        yields: Whether to leave the order to a handler that the script has installed for the signal.

    Attributes:
        requested: Whether the signal has come.
        accepted: Whether the ranks have agreed to end because of it.
    """

    def __init__(self, signum: int, order: Callable[[], None] | None, *, grace: float, yields: bool) -> None:
        self._signum, self._order, self._grace, self._yields = signum, order, grace, yields
        self.requested = self.accepted = False
        self._previous: Any = None
        self._listening = False
        self._clock: threading.Timer | None = None
        self._once = threading.Lock()
        self._owner = os.getpid()

    def listen(self) -> None:
        """Install the handler; the one that was there before is called by it."""
        if self._listening:
            return
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                f"The signal {_name(self._signum)} cannot be listened for, because this is not the main thread: the "
                "job will not be requeued.",
                stacklevel=2,
            )
            return
        self._previous = signal.getsignal(self._signum)
        if callable(self._previous) and self._yields:
            self._order = None
        signal.signal(self._signum, self._hear)
        self._listening = True
        atexit.register(self.stop)

    def stop(self) -> None:
        """Put the previous handler back. Gives the order if the ranks have accepted it."""
        if not self._listening:
            return
        self._listening = False
        atexit.unregister(self.stop)
        if self._clock is not None:
            self._clock.cancel()
        if signal.getsignal(self._signum) == self._hear and (
            threading.current_thread() is threading.main_thread()
        ):
            signal.signal(self._signum, signal.SIG_DFL if self._previous is None else self._previous)
        if self.accepted:
            self.give_order()

    def give_order(self) -> None:
        """Give the order, unless it was given before."""
        if self._order is not None and self._once.acquire(blocking=False):
            self._order()

    def _hear(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._owner:
            return  # a process that was forked from here, such as a loader's worker: not its business
        if not self.requested:
            self.requested = True
            if self._order is not None:
                self._clock = threading.Timer(self._grace, self.give_order)
                self._clock.daemon = True
                self._clock.start()
        if callable(self._previous):
            self._previous(signum, frame)


def _name(signum: int) -> str:
    return signal.Signals(signum).name
