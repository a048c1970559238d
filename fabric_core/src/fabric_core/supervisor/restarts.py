"""Starting the ranks again after a failure. Where they go on is the program's business, by its latest checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from fabric_core.supervisor.outcome import Outcome, report, say

_KILLED = 128  # from here on, exit codes name the signal that ended a rank


def run_attempts(attempt: Callable[[int], Outcome], max_restarts: int) -> Outcome:
    """Run a job until it succeeds, is told to end, or has been restarted often enough; how it ended last.

    Every attempt is reported to ``sys.stderr``, and so is what follows.

    Args:
        attempt: Runs all ranks of the job to their end, given the number of restarts before.
        max_restarts: How many restarts there are at most.
    """
    for restarts in range(max_restarts + 1):
        outcome = attempt(restarts)
        report(outcome)
        if outcome.first is None or outcome.told_to_end or outcome.undead or not max_restarts:
            return outcome
        if restarts == max_restarts:
            say(f"not started again: this was restart {restarts} of {max_restarts}")
        elif restarts == 0 and _would_fail_again(outcome):
            say("not started again: no rank had met the others yet, so the next attempt would end alike")
            return outcome
        else:
            say(f"all ranks are started again: restart {restarts + 1} of {max_restarts}")
    return outcome


def _would_fail_again(outcome: Outcome) -> bool:
    """Whether the program itself is at fault, rather than what it met with on the way."""
    return not outcome.joined and outcome.first is not None and outcome.first.exit_code < _KILLED
