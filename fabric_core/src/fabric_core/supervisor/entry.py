"""What a process does first when it becomes a rank, and last when it ends."""

from __future__ import annotations

import faulthandler
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager

from fabric_core.orphans import die_with_parent
from fabric_core.supervisor.failures import Failure, crash_path, failed_at, write_failure
from fabric_core.supervisor.outcome import PREEMPTED
from fabric_core.supervisor.signals import INTERRUPTED, hear_interrupt, ignore_interrupt
from fabric_core.supervisor.tracebacks import show, strip_plumbing, summary_of, text_of

_STDOUT = 1
_UNREAD = 128 + 13  # as SIGPIPE, which Python ignores, would have ended the process


@contextmanager
def enter_rank(
    rank: int,
    error_dir: str | None,
    *,
    parent_pid: int | None = None,
    alone: bool = False,
    excepthook: bool = False,
) -> Iterator[None]:
    """Make this process a supervised rank, whose whole work is done inside the ``with`` block.

    Called once, in the main thread of a started process, before anything else. The process dies with its parent,
    hears an interrupt once, and leaves a record in ``error_dir`` of how it failed: by an exception, a nonzero
    ``sys.exit``, a crash of the interpreter. It prints nothing then, because the supervisor does. A function that
    leads to the user's code keeps itself out of tracebacks by setting a local variable ``__tracebackhide__``.

    Args:
        rank: The global rank.
        error_dir: The supervisor's directory for failures; ``None`` where nobody collects them, so that they
            are shown here.
        parent_pid: The supervisor's ``os.getpid()``.
        alone: Whether this is the only rank of the node, which shows its own exception at once.
        excepthook: Whether a ``sys.excepthook`` that is not the standard one is the program's own. Processes
            that were forked have that of their parent.

    Raises:
        SystemExit: The block raised; 130 for ``KeyboardInterrupt``, 1 for any other exception.
    """
    __tracebackhide__ = True
    die_with_parent(parent_pid)
    if error_dir is not None:
        # No file object: the interpreter writes into it while it crashes, which may be as late as its own end.
        faulthandler.enable(os.open(crash_path(error_dir, rank), os.O_CREAT | os.O_WRONLY, 0o600))
    try:
        hear_interrupt()
        yield
        ignore_interrupt()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as error:
        ignore_interrupt()
        code, message = _exit_status(error.code)
        failure = Failure(rank, code, failed_at(error), f"exited with code {code}", message, shown=alone)
        if code not in (0, PREEMPTED) and _recorded(error_dir, failure) and not alone:
            raise SystemExit(code) from None
        raise
    except BaseException as error:
        ignore_interrupt()
        if isinstance(error, BrokenPipeError) and _nobody_reads(_STDOUT):
            _recorded(error_dir, Failure(rank, _UNREAD, failed_at(error), "nobody reads its output any more"))
            os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)  # what is left to be written would fail again
            raise SystemExit(_UNREAD) from None
        strip_plumbing(error)
        alone = alone or error_dir is None
        text = "" if alone else text_of(error, by_hook=excepthook)
        failure = Failure(rank, 1, failed_at(error), summary_of(error), text, shown=alone)
        if not _recorded(error_dir, failure) or alone:
            show(error)
        raise SystemExit(1) from error


def _nobody_reads(descriptor: int) -> bool:
    """Whether what is written there meets a pipe that its reader has closed, as in ``fabric run … | head``."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _recorded(error_dir: str | None, failure: Failure) -> bool:
    """Write the record; whether the supervisor will find it, so that the failure need not be shown here."""
    if error_dir is None:
        return False
    try:
        write_failure(error_dir, failure)
    except OSError:
        return False
    return True


def _exit_status(code: object) -> tuple[int, str]:
    """The exit code that the system will report for a ``SystemExit``, and the message that goes with it."""
    if code is None:
        return 0, ""
    if isinstance(code, int):
        return code & 0xFF, ""
    return 1, f"{code}\n"
