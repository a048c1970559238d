"""What the supervisor knows about a process that it watches over."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


class Child(Protocol):
    """A started process. ``subprocess.Popen`` is one as it stands."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def poll(self) -> int | None:
        """``None`` while it lives; then its exit code, or ``-N`` when signal N ended it."""

    def send_signal(self, sig: int, /) -> None:
        """Send a signal; nothing when it has ended."""


class ProcessChild:
    """A process of the ``multiprocessing`` module as a `Child`."""

    def __init__(self, process: BaseProcess) -> None:
        if process.pid is None:
            raise ValueError(f"{process!r} has not been started. Call its start() first.")
        self.process = process
        self.pid = process.pid

    def poll(self) -> int | None:
        """As `Child.poll`."""
        return self.process.exitcode

    def send_signal(self, sig: int, /) -> None:
        """As `Child.send_signal`."""
        if self.poll() is None:
            os.kill(self.pid, sig)


class AdoptedChild:
    """A child that another process has forked.

    Raises:
        ChildProcessError: The process is no child of this one.
    """

    def __init__(self, pid: int) -> None:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        """As `Child.poll`."""
        if self._status is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it, and knows its status alone
                pid, status = self.pid, 0
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def send_signal(self, sig: int, /) -> None:
        """As `Child.send_signal`."""
        if self.poll() is None:
            os.kill(self.pid, sig)


def exit_code_of(status: int) -> int:
    """The exit code that a shell would give to a status: 128 + N when signal N ended the process."""
    return status if status >= 0 else 128 - status
