"""Signals on both sides: the supervisor's, which must act on them, and a rank's, which must not be noisy."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

SIGINT = int(signal.SIGINT)
SIGTERM = int(signal.SIGTERM)
# Windows knows neither; what is sent there ends the process in any case.
SIGKILL = int(getattr(signal, "SIGKILL", signal.SIGTERM))
SIGHUP = int(getattr(signal, "SIGHUP", signal.SIGTERM))

ENDING = (SIGINT, SIGTERM, SIGHUP)
"""What asks a job to end now."""
ANNOUNCING = tuple(int(getattr(signal, name)) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""What schedulers send ahead of the end: ``sbatch --signal=USR1@60``."""

INTERRUPTED = 128 + SIGINT


class Inbox:
    """Keeps the signals that are meant for the ranks too, for the supervision loop. Used in a ``with`` block.

    Only the main thread can receive signals: elsewhere the inbox stays empty. A signal that this process was
    started to ignore (``nohup``) stays ignored.

    Attributes:
        fd: Becomes readable when a signal has come.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._received: list[int] = []
        self._before: dict[int, Any] = {}
        self.fd, self._bell = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._bell, False)

    def __enter__(self) -> Inbox:
        if threading.current_thread() is threading.main_thread():
            for signum in (*ENDING, *ANNOUNCING):
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._receive)
            if hasattr(signal, "SIGCHLD") and signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
                # The system would throw the exit codes of our children away; each would look like a success.
                self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for signum, handler in self._before.items():
            # None: the handler was not installed from Python and cannot be put back by it.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        os.close(self.fd)
        os.close(self._bell)

    def _receive(self, signum: int, _: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked child that does not hear_interrupt yet
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        self._received.append(signum)
        try:
            os.write(self._bell, b"!")
        except BlockingIOError:
            return  # the bell is ringing already

    @property
    def tells_to_end(self) -> bool:
        """Whether a signal that asks for the end waits to be taken."""
        return any(signum in ENDING for signum in self._received)

    def hush(self) -> None:
        """Let ``fd`` be silent until the next signal. What has come waits to be taken nevertheless."""
        with suppress(BlockingIOError):
            while os.read(self.fd, 512):
                continue

    def take(self) -> list[int]:
        """The signals that came since the last call, in their order."""
        self.hush()
        taken, self._received = self._received, []
        return taken


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back in this thread, and in processes that it starts until they `hear_interrupt`.

    An interpreter that is interrupted while it starts prints a traceback of its own.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear_interrupt() -> None:
    """Give a started process signal handlers of its own; the first interrupt raises ``KeyboardInterrupt``.

    Called in its main thread. An interrupt that was held back is raised here.
    """
    for signum in (SIGTERM, SIGHUP, *ANNOUNCING):
        if isinstance(getattr(signal.getsignal(signum), "__self__", None), Inbox):
            signal.signal(signum, signal.SIG_DFL)
    if signal.getsignal(SIGINT) is not signal.SIG_IGN:
        signal.signal(SIGINT, _interrupt_once)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [SIGINT])


def ignore_interrupt() -> None:
    """From here on this process ends by itself, or by the supervisor's other signals."""
    if signal.getsignal(SIGINT) is _interrupt_once:
        signal.signal(SIGINT, _ignore)


def _interrupt_once(_: int, __: FrameType | None) -> None:
    """Terminal and supervisor may both send it; the second must not disturb the cleaning up after the first."""
    ignore_interrupt()
    raise KeyboardInterrupt


def _ignore(signum: int, frame: FrameType | None) -> None:
    """Unlike ``SIG_IGN``, not inherited by programs that this process starts."""
