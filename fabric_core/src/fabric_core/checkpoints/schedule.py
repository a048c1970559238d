"""When it is time for the next checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from fabric_core.contracts.agreement import Agreement
from fabric_core.errors import ConfigurationError


class Schedule:
    """Every so many steps, or every so much time.

    Args:
        every: Steps, or a ``timedelta``.
        agreement: Of the ranks.
        agree: Sends an object from rank 0 to every rank.

    Raises:
        ConfigurationError: ``every`` is neither above 0 nor ``None``.
    """

    def __init__(self, every: Any, agreement: Agreement, agree: Callable[[bool], bool]) -> None:
        if every is not None and not _is_positive(every):
            raise ConfigurationError(
                f"every={every!r} does not say when to save. It takes a number of steps, or a datetime.timedelta."
            )
        self._every: int | timedelta | None = every
        self._agreement, self._agree = agreement, agree
        self._met = False
        self._step: int | None = None
        self._time = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a multiple of ``every`` lies between the last save and ``step``, or that much time.

        Called on every rank. For steps, the answer is the same in a training that was interrupted in between.

        Raises:
            ConfigurationError: There is no ``every``.
            SetupError: With a ``timedelta``, the first time since a save: some rank did not come.
        """
        if self._every is None:
            raise ConfigurationError(
                "When to save was never said: fabric.checkpoints(…, every=…) takes a number of steps, or a "
                "datetime.timedelta."
            )
        if isinstance(self._every, timedelta):
            if not self._met:  # a program that asks on some ranks only does so from the first time on
                self._agreement.meet("checkpoints.due")
                self._met = True
            return self._agree(time.monotonic() - self._time >= self._every.total_seconds())  # clocks differ
        if self._step is None or step < self._step:  # at the start, or when a training has gone back
            self._step = step - 1
        return step // self._every > self._step // self._every

    def saved(self, step: int) -> None:
        """There is a checkpoint of this step now."""
        self._step = step
        self._time = time.monotonic()
        self._met = False


def _is_positive(every: Any) -> bool:
    if isinstance(every, timedelta):
        return every > timedelta()
    return isinstance(every, int) and not isinstance(every, bool) and every > 0
