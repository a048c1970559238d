"""Being told to stop before the end: one rank hears a signal, and all ranks stop at the same step.

[Note: preemption] Signals reach the ranks at different moments, and a rank that stopped alone would leave the others
waiting for it in a collective. So a signal is only noted, and the ranks agree on it by a small all-reduce. Every rank
reads ``fabric.preempted`` once per step, so the number of reads is a clock that they share: each reduction also agrees
on the read at which the next is due, about half a second later by the slowest step of the slowest rank. There is no
collective per step, no thread, and no moment at which one rank has decided and another has not.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch

from fabric_core.contracts.strategy import Strategy
from fabric_core.errors import ConfigurationError
from fabric_core.supervisor import Milestone, tell_supervisor

_CHECK_EVERY = 0.5  # seconds from one agreement to the next
_MOST_READS = 64  # between two agreements: a loop that becomes slow is noticed after so many slow steps
_SAME_NOTICE = 2.0  # seconds in which a scheduler and a supervisor may both pass one notice on

DEFAULT_SIGNALS = ("SIGTERM",)


class Notice:
    """Hears signals in this process.

    The first of each is noted, and again whatever comes within two seconds: a scheduler may send it to every process
    of a job while a supervisor passes it on. After that, and after `close`, a signal does what it did before.

    Args:
        signals: Names or numbers.

    Attributes:
        heard: Whether one has come.

    Raises:
        ConfigurationError: There is no such signal, or no process can hear it.
    """

    def __init__(self, signals: Iterable[str | int]) -> None:
        self.heard = False
        self._signals = set(map(signal_number, signals))  # one may be asked for by several names
        self._before: dict[int, Any] = {}
        self._first: dict[int, float] = {}
        self._owner = os.getpid()
        self._closed = False

    def listen(self) -> None:
        """Install the handlers. Only the main thread can; elsewhere this rank hears nothing, and is told so."""
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "This rank cannot hear that the job is to be stopped, because fabric.preempted is first read outside "
                "of the main thread. Call fabric.watch_for_preemption() in the main thread before.",
                stacklevel=5,
            )
            return
        for signum in self._signals:
            self._before[signum] = signal.getsignal(signum)
            signal.signal(signum, self._hear)

    def close(self) -> None:
        """Put back what was there before, where it can be put back."""
        self._closed = True
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in self._before:
            if signal.getsignal(signum) == self._hear:
                before = self._handler_before(signum)
                signal.signal(signum, signal.SIG_DFL if before is None else before)

    @property
    def keeps_alive(self) -> bool:
        """Whether SIGTERM would end this process if it were not noted here."""
        return signal.SIGTERM in self._before and self._handler_before(signal.SIGTERM) in (
            signal.SIG_DFL,
            None,
        )

    def _handler_before(self, signum: int) -> Any:
        """What was installed before; where that was another `Notice` which is closed by now, what was before that."""
        before = self._before[signum]
        other = getattr(before, "__self__", None)
        return other._handler_before(signum) if isinstance(other, Notice) and other._closed else before

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        before, now = self._handler_before(signum), time.monotonic()
        is_ours = os.getpid() == self._owner  # Forked processes hear only what their parents end them by.
        if is_ours and not self._closed and now - self._first.setdefault(signum, now) < _SAME_NOTICE:
            self.heard = True
            if before is signal.default_int_handler:
                return
        elif before in (signal.SIG_DFL, None) and (is_ours or signum == signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if callable(before):
            before(signum, frame)


class Preemption:
    """What the ranks of a job know about its end. See [Note: preemption].

    Args:
        strategy: Of this rank, connected.
        world_size: How many ranks agree.
        signals: What is heard, as names or numbers.

    Attributes:
        agreed: Whether all ranks stop.
    """

    def __init__(self, strategy: Strategy, world_size: int, signals: Iterable[str | int]) -> None:
        self.agreed = False
        self._strategy = strategy
        self._alone = world_size == 1
        self._notice = Notice(signals)
        self._reads_left = 1  # until the next agreement
        self._reads_between = 1
        self._last_read: float | None = None
        self._longest = 0.0  # seconds between two reads since the last agreement

    def watch(self) -> None:
        """Begin to hear signals. Called once, on every rank."""
        self._notice.listen()
        if self._notice.keeps_alive:
            tell_supervisor(Milestone.WATCHES)

    def read(self) -> bool:
        """Whether all ranks stop now. Called on every rank equally often."""
        if self.agreed:
            return True
        now = time.monotonic()
        if self._last_read is not None and now - self._last_read > self._longest:
            self._longest = now - self._last_read
        self._last_read = now
        self._reads_left -= 1
        return self._reads_left <= 0 and self._agree()

    def close(self) -> None:
        """Hear nothing any more."""
        self._notice.close()

    def _agree(self) -> bool:
        environment = self._strategy.surroundings.cluster_environment
        facts = (self._notice.heard, environment.requeue_requested, self._longest)
        heard, requeue, longest = self._greatest(facts)
        self.agreed = bool(heard or requeue)
        if requeue:
            environment.accept_requeue()
        if self.agreed:
            tell_supervisor(Milestone.PREEMPTED)
        if not self._alone:
            self._reads_between = reads_between(self._reads_between, longest)
        self._reads_left, self._longest = self._reads_between, 0.0
        self._last_read = time.monotonic()
        return self.agreed

    def _greatest(self, facts: tuple[float, ...]) -> tuple[float, ...]:
        """Of each number the greatest on any rank, the same on all."""
        if self._alone:
            return facts
        tensor = torch.tensor(facts, dtype=torch.float32, device=self._strategy.root_device)
        return tuple(self._strategy.all_reduce(tensor, "max").tolist())


def reads_between(before: int, longest: float) -> int:
    """How many reads there are until the next agreement.

    Args:
        before: How many there were until this one. At most twice as many follow, since what is known of the loop's
            speed is its past.
        longest: Seconds between two reads, at most.
    """
    fitting = _CHECK_EVERY / longest if longest > 0 else math.inf
    return int(max(1, min(2 * before, _MOST_READS, fitting)))


def signal_number(asked: str | int) -> int:
    """The number of a signal that is asked for by name (``"SIGUSR1"``, ``"usr1"``) or number.

    Raises:
        ConfigurationError: There is none, or it cannot be handled.
    """
    try:
        if isinstance(asked, str):
            signum = int(signal.Signals[f"SIG{asked.upper().removeprefix('SIG')}"])
        else:
            signum = int(signal.Signals(asked))
    except (ValueError, KeyError):
        raise ConfigurationError(
            f"{asked!r} is no signal of this system. Give a name or a number, such as 'SIGTERM' or 'SIGUSR1'."
        ) from None
    if signum in _DEAF_TO:
        raise ConfigurationError(
            f"No process can hear {asked!r}: the system ends or stops it at once. Ask for a signal that comes before "
            "it, such as 'SIGTERM' or 'SIGUSR1'."
        )
    return signum


_DEAF_TO = {getattr(signal, name) for name in ("SIGKILL", "SIGSTOP") if hasattr(signal, name)}
