"""Gradient accumulation: windows of micro-batches, at the end of which gradients are synchronised and applied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fabric_core.data.iteration import LoaderTracker
from fabric_core.errors import ConfigurationError


@dataclass
class Window:
    """The micro-batches between two steps of one model.

    Attributes:
        length: How many micro-batches it has in all: ``every``, or fewer when the loader ends before.
        index: The number of the current one, from 0.
        correction: What the gradients collected so far have to be multiplied with, because the window became shorter
            than it was when their losses were divided (the loop was left early, or a batch was dropped); mostly 1.
    """

    length: int = 1
    index: int = 0
    correction: float = 1.0

    @property
    def is_full(self) -> bool:
        """Whether the current micro-batch is the last one: gradients are synchronised, and optimizers step."""
        return self.index + 1 >= self.length


class Accumulation:
    """The windows of one ``Fabric``, by the models that they are for.

    Attributes:
        active: The window of the innermost ``with fabric.accumulate(…)`` that is running.
    """

    def __init__(self, tracker: LoaderTracker) -> None:
        self.active: Window | None = None
        self._tracker = tracker
        self._windows: dict[tuple[int, ...], Window] = {}

    @property
    def is_open(self) -> bool:
        """Whether a window is running that is not full yet, so that optimizers have to wait."""
        return self.active is not None and not self.active.is_full

    @property
    def length(self) -> int:
        """What losses are divided by."""
        return 1 if self.active is None else self.active.length

    @contextmanager
    def enter(self, key: tuple[int, ...], every: int) -> Iterator[Window]:
        """Run one micro-batch in the window of ``key``; when it fails, it does not count."""
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigurationError(
                f"accumulate(every={every!r}) has to be a whole number of batches, from 1."
            )
        window = self._windows.setdefault(key, Window(length=0))
        self._measure(window, every)
        outer, self.active = self.active, window
        try:
            yield window
        finally:
            self.active = outer
        window.index = 0 if window.is_full else window.index + 1

    def _measure(self, window: Window, every: int) -> None:
        """A loader that ends before the window is full makes it shorter; without a loader, we count alone."""
        planned = every if window.index == 0 else window.length
        loop, done = self._tracker.current, window.index + 1
        window.length = planned if loop is None else done + loop.remaining(planned - done)
        window.correction = planned / window.length if window.index else 1.0
