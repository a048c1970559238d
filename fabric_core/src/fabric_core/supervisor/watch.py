"""The supervision loop: waits for deaths, signals and deadlines, and ends the others when one rank fails."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext

from fabric_core.errors import LaunchError
from fabric_core.supervisor.children import Child, exit_code_of
from fabric_core.supervisor.failures import Failure, read_crash, read_failure
from fabric_core.supervisor.milestones import Milestone, has_told
from fabric_core.supervisor.outcome import PREEMPTED, Outcome, died_of
from fabric_core.supervisor.signals import ANNOUNCING, SIGINT, SIGKILL, SIGTERM, Inbox, interrupts_held

GRACE_VARIABLE = "FABRIC_GRACE_SECONDS"
_GRACE = 30.0  # seconds
_SETTLE = 0.25  # what was noticed first may be a consequence, and its cause is still being written down
_INTERRUPT_GRACE = 2.0  # an impatient user waits
_SAME_KEYSTROKE = 0.2  # a wrapper program may pass on the Ctrl-C that the terminal has sent to all
_SAME_NOTICE = 2.0  # and a scheduler may send SIGTERM to it and to us
_HOPELESS_AFTER = 5.0  # what SIGKILL has not ended by then hangs in the kernel
_HEARTBEAT = 0.5  # how often to look for a rank that has failed but does not end
_POLL_EVERY = 0.02  # how often to look for deaths where the system cannot announce them


def supervise(
    children: Iterable[tuple[int, Child]],
    *,
    error_dir: str | None = None,
    grace: float | str | None = None,
    inbox: Inbox | None = None,
) -> Outcome:
    """Watch over started processes until the last has ended; when one fails, end the others.

    Called in the parent, in the thread that starts the processes. While it runs, the main thread passes SIGINT,
    SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 on. Whatever happens, none of the processes is left behind.

    Args:
        children: Pairs of global rank and process. Best a generator that *starts* each process when asked for
            it: no signal can fall between the start and the supervision, and a failing start ends the others.
        error_dir: Where the ranks record their failures (`error_directory`).
        grace: Seconds between SIGTERM and SIGKILL (default: ``FABRIC_GRACE_SECONDS``, else 30).
        inbox: Where signals to this process arrive already, if anywhere. It stays open.

    Returns:
        How it ended; see `report` and `raise_for_outcome`.

    Raises:
        LaunchError: The grace period is no number. What ``children`` raises passes through.
    """
    seconds = grace_seconds(grace)
    with nullcontext(inbox) if inbox else Inbox() as opened, selectors.DefaultSelector() as selector:
        selector.register(opened.fd, selectors.EVENT_READ)
        watch = _Watch(opened, selector, error_dir, seconds)
        try:
            with interrupts_held():
                for rank, child in children:
                    watch.add(rank, child)
            watch.until_all_ended()
        finally:
            watch.kill_the_rest()
        return watch.outcome()


def grace_seconds(grace: float | str | None = None) -> float:
    """The grace period: the argument, else the environment's, else 30 seconds.

    Raises:
        LaunchError: It is not a number of seconds.
    """
    value = os.environ.get(GRACE_VARIABLE, _GRACE) if grace is None else grace
    try:
        seconds = float(value)
        if seconds >= 0:
            return seconds
    except ValueError:
        pass
    raise LaunchError(
        f"The grace period is {value!r}. Set grace (--grace), or the environment variable {GRACE_VARIABLE}, "
        "to a number of seconds that is 0 or more."
    )


class _Watch:
    """The state of one supervision. ``ending_since`` is set once, with the cause of the end."""

    def __init__(
        self, inbox: Inbox, selector: selectors.BaseSelector, error_dir: str | None, grace: float
    ) -> None:
        self.inbox = inbox
        self.selector = selector
        self.error_dir = error_dir
        self.grace = grace
        self.living: dict[int, Child] = {}
        self.failures: dict[int, Failure] = {}
        self.pidfds: dict[int, int] = {}
        self.ranks: list[int] = []
        self.ending_since: float | None = None
        self.signum: int | None = None
        self.steps: list[tuple[float, int | None]] = []  # what to send to the living, and when; None: give up
        self.sent = False
        self.hopeless = False
        self.in_order = True  # every rank that has ended said that all went well, or that it was preempted
        self.overdue: tuple[int, ...] = ()
        self.told_to_end = False
        self.last_look = time.monotonic()

    def add(self, rank: int, child: Child) -> None:
        self.living[rank] = child
        self.ranks.append(rank)
        fd = _open_pidfd(child.pid)
        if fd is not None:
            self.pidfds[rank] = fd
            self.selector.register(fd, selectors.EVENT_READ)

    def until_all_ended(self) -> None:
        while self.living and not self.hopeless:
            self.selector.select(self._patience())
            self._heed_signals()
            self._look()
            self._take_steps()
        self._heed_signals()

    def kill_the_rest(self) -> None:
        """Nothing is left to do here, unless an exception has cut the loop short."""
        until = time.monotonic() + (0.0 if self.hopeless else _HOPELESS_AFTER)
        for child in self.living.values():
            child.send_signal(SIGKILL)
            while child.poll() is None and time.monotonic() < until:
                time.sleep(_POLL_EVERY)
        for rank in list(self.pidfds):
            self._close_pidfd(rank)

    def outcome(self) -> Outcome:
        failures = sorted(self.failures.values(), key=lambda failure: failure.time)
        preempted = self._any_has_told(Milestone.PREEMPTED)
        if self.signum is not None and not preempted:
            failures = []  # consequences of the signal
        code = failures[0].exit_code if failures else 128 + self.signum if self.signum is not None else 0
        return Outcome(
            PREEMPTED if preempted and self.in_order else code,
            failures[0] if failures else None,
            tuple(failures[1:]),
            self.signum,
            tuple(child.pid for child in self.living.values()),
            self.overdue,
            self._any_has_told(Milestone.JOINED),
            self.told_to_end,
        )

    def _any_has_told(self, milestone: Milestone) -> bool:
        return any(has_told(self.error_dir, rank, milestone) for rank in self.ranks)

    def _patience(self) -> float:
        """Seconds to wait at most."""
        longest = _HEARTBEAT if len(self.pidfds) == len(self.living) else _POLL_EVERY
        return max(0.0, min(longest, self.steps[0][0] - time.monotonic())) if self.steps else longest

    # Causes of the end: a signal, or a failure.

    def _heed_signals(self) -> None:
        for signum in self.inbox.take():
            now = time.monotonic()
            self.told_to_end |= signum not in ANNOUNCING
            if signum in ANNOUNCING:
                self._pass_on(signum)
            elif self.ending_since is None:
                self.signum, self.ending_since = signum, now
                if signum == SIGINT:
                    grace = min(self.grace, _INTERRUPT_GRACE)
                    self._plan((0.0, SIGINT), (grace / 2, SIGTERM), (grace, SIGKILL))
                else:
                    self._plan((0.0, signum), (self.grace, SIGKILL))
            elif signum == SIGINT and (self.signum != SIGINT or now - self.ending_since > _SAME_KEYSTROKE):
                self._plan((0.0, SIGKILL))
            elif now - self.ending_since > _SAME_NOTICE:
                self._pass_on(signum)

    def _look(self) -> None:
        """Collect deaths and records of failure; the first of either begins the end."""
        started = time.monotonic()
        statuses = {rank: child.poll() for rank, child in self.living.items()}
        for rank, status in statuses.items():
            if rank not in self.failures:
                self._judge(rank, status)
            if status is not None:
                self.in_order &= rank not in self.failures and status in (0, PREEMPTED)
                del self.living[rank]
                self._close_pidfd(rank)
        self.last_look = started
        if self.failures and self.ending_since is None and (len(self.ranks) > 1 or not self.living):
            self.ending_since = time.monotonic()
            self._plan((_SETTLE, SIGTERM), (_SETTLE + self.grace, SIGKILL))

    def _judge(self, rank: int, status: int | None) -> None:
        """Note the failure of a rank, if it is one. A death that we may have caused is none."""
        if status == PREEMPTED and has_told(self.error_dir, rank, Milestone.PREEMPTED):
            return
        record = read_failure(self.error_dir, rank) if self.error_dir is not None else None
        if record is not None:
            self.failures[rank] = record
        elif status and not self.sent:
            self.failures[rank] = self._unrecorded(rank, status)

    def _unrecorded(self, rank: int, status: int) -> Failure:
        crash = read_crash(self.error_dir, rank) if self.error_dir is not None else None
        if crash is not None:
            return Failure(rank, exit_code_of(status), crash[0], died_of(status), crash[1])
        # A kill is nobody's consequence, so it may be as old as the last look; an exit may well be one.
        when = self.last_look if status < 0 else time.monotonic()
        return Failure(rank, exit_code_of(status), when, died_of(status))

    # The end itself.

    def _plan(self, *steps: tuple[float, int]) -> None:
        """Replace what was planned by steps of (seconds from now, signal)."""
        now = time.monotonic()
        last = steps[-1][0] + _HOPELESS_AFTER
        self.steps = [(now + after, signum) for after, signum in steps] + [(now + last, None)]

    def _take_steps(self) -> None:
        while self.steps and self.steps[0][0] <= time.monotonic():
            signum = self.steps.pop(0)[1]
            self.hopeless = signum is None
            if signum is not None:
                self._send(signum)

    def _send(self, signum: int) -> None:
        self.sent = True
        if signum == SIGKILL:
            self.overdue = tuple(self.living)
        for rank, child in self.living.items():
            if signum == SIGTERM and self.failures:
                self._end_after_failure(rank, child)
            else:
                child.send_signal(signum)

    def _end_after_failure(self, rank: int, child: Child) -> None:
        """Send what ends a rank that waits for one that is gone; nobody can save any more."""
        if rank not in self.failures:  # those are ending already, and may use the grace period for that
            child.send_signal(SIGKILL if has_told(self.error_dir, rank, Milestone.WATCHES) else SIGTERM)

    def _pass_on(self, signum: int) -> None:
        """Send what this process was sent. What a rank makes of an announcement is the rank's doing."""
        for child in self.living.values():
            child.send_signal(signum)

    def _close_pidfd(self, rank: int) -> None:
        fd = self.pidfds.pop(rank, None)
        if fd is not None:
            self.selector.unregister(fd)
            os.close(fd)


def _open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; ``None`` where the system has no such thing."""
    opener: Callable[[int], int] | None = getattr(os, "pidfd_open", None)
    try:
        return opener(pid) if opener is not None else None
    except OSError:
        return None
