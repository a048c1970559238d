"""How a launch ended, and how that is told: to a terminal, or as an exception."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from typing import TextIO

from fabric_core.errors import LaunchError, RankFailedError
from fabric_core.supervisor.failures import Failure
from fabric_core.supervisor.signals import SIGINT, SIGKILL

PREEMPTED = 75
"""The exit code of a run whose ranks have saved and stopped before the end: ``EX_TEMPFAIL``, "try again later"."""

_MOST_LINES = 4


@dataclass(frozen=True)
class Outcome:
    """How the ranks of this node ended.

    Attributes:
        exit_code: The first failing rank's; 75 when the ranks agreed to stop before the end, and did; 128 + N when
            the supervisor was ended by signal N; else 0.
        first: The failure that came first.
        later: Failures of other ranks, in their order. Ranks that the supervisor ended are not among them.
        signum: The signal that the supervisor was ended by.
        undead: Process ids that not even SIGKILL has ended.
        overdue: Ranks that were still at work when the grace period was over.
        joined: Whether a rank had met the others.
        told_to_end: Whether a signal asked the supervisor to end, if only while it was ending for another reason.
    """

    exit_code: int = 0
    first: Failure | None = None
    later: tuple[Failure, ...] = ()
    signum: int | None = None
    undead: tuple[int, ...] = ()
    overdue: tuple[int, ...] = ()
    joined: bool = False
    told_to_end: bool = False


def report(outcome: Outcome, stream: TextIO | None = None) -> None:
    """Write what the user has to know to ``stream`` (default: ``sys.stderr``). The first traceback comes last."""
    stream = stream or sys.stderr
    text = "".join(f"fabric: {line}\n" for line in _lines(outcome)) + _text(outcome)
    if text and stream is not None:
        stream.write(text)
        stream.flush()


def say(line: str) -> None:
    """Write one line about the launch to ``sys.stderr``."""
    if sys.stderr is not None:
        sys.stderr.write(f"fabric: {line}\n")
        sys.stderr.flush()


def raise_for_outcome(outcome: Outcome) -> None:
    """Raise what a launch inside a living program ends with; return when all ranks succeeded.

    Raises:
        RankFailedError: A rank failed. The message ends with its traceback.
        KeyboardInterrupt: The launch was interrupted.
        SystemExit: This program was told to end, and the ranks have stopped in order; with exit code 75.
        LaunchError: The launch was ended by a signal which this program then survived.
    """
    if outcome.first is not None:
        message = "\n".join([*_lines(outcome), _text(outcome)]).strip()
        raise RankFailedError(
            f"{message[0].upper()}{message[1:]}", rank=outcome.first.rank, exit_code=outcome.exit_code
        )
    if outcome.signum is not None and outcome.exit_code == PREEMPTED:
        raise SystemExit(PREEMPTED)
    if outcome.signum == SIGINT:
        raise KeyboardInterrupt
    if outcome.signum is not None:
        signal.raise_signal(outcome.signum)
        raise LaunchError(f"All ranks were ended, because this process received {_name(outcome.signum)}.")


def _lines(outcome: Outcome) -> list[str]:
    lines = [
        f"process {pid} does not end, not even by SIGKILL; a device or file system may hang"
        for pid in outcome.undead
    ]
    if outcome.exit_code == PREEMPTED and outcome.first is None:
        lines.append(f"preempted: every rank has stopped before the end (exit code {PREEMPTED})")
    elif outcome.signum is not None:
        lines.append("interrupted" if outcome.signum == SIGINT else f"ended by {_name(outcome.signum)}")
        if outcome.overdue and outcome.signum != SIGINT:
            lines[-1] += (
                f"; {len(outcome.overdue)} rank(s) did not end within the grace period and were killed"
            )
    first = outcome.first
    if first is None or (first.shown and not outcome.later):
        return lines
    told = outcome.later[:_MOST_LINES]
    lines += [f"rank {failure.rank} then failed: {failure.summary}" for failure in told]
    if len(outcome.later) > len(told):
        lines.append(f"{len(outcome.later) - len(told)} more ranks then failed")
    return [*lines, f"rank {first.rank} failed{' first' if told else ''}: {first.summary}"]


def _text(outcome: Outcome) -> str:
    """The traceback of the first failure, unless the user has seen it."""
    return "" if outcome.first is None or outcome.first.shown else outcome.first.text


def died_of(status: int) -> str:
    """One line about a process that ended without a word."""
    if status >= 0:
        return f"exited with code {status}"
    hint = " (the system may have run out of memory: see dmesg)" if -status == SIGKILL else ""
    return f"killed by {_name(-status)}{hint}"


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"
