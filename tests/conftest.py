"""What holds for every test."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

NOT_RUN = "not run: "
"""How the reason begins of a test that is skipped because this machine lacks what it runs on."""


@pytest.fixture(scope="session", autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """A runner in the background, or under nohup, ignores these signals, and so would all that the tests start."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [signum for signum in usual if signal.getsignal(signum) is signal.SIG_IGN]
    for signum in ignored:
        signal.signal(signum, usual[signum])
    yield
    for signum in ignored:
        signal.signal(signum, signal.SIG_IGN)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many tests on real engines were not run, and why."""
    stats = terminalreporter.stats
    reasons = [str(report.longrepr[2]).removeprefix("Skipped: ") for report in stats.get("skipped", [])]
    missing = Counter(reason.removeprefix(NOT_RUN) for reason in reasons if reason.startswith(NOT_RUN))
    run = sum("engine" in report.keywords for report in (*stats.get("passed", []), *stats.get("failed", [])))
    if run or missing:
        causes = "".join(f"\n  {count}: {reason}" for reason, count in missing.items())
        terminalreporter.write_line(f"{missing.total()} engine test(s) not run, {run} run{causes}")
