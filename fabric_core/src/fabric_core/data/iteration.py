"""Where a loop over a loader stands.

One object per loop, not per loader: loops over one loader may be nested, left early or run side by side.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, IterableDataset

if TYPE_CHECKING:
    from fabric_core.data.order import Order


class LoaderTracker:
    """Knows which loop the code that runs now belongs to. Shared by the loaders of one ``Fabric``.

    Attributes:
        current: The loop that handed out a batch last and has not ended; ``None`` outside of loops.
        live: All loops that have begun and have not ended, in the order in which they began.
        batches: How many batches all loops together have handed out.
    """

    __slots__ = ("_last_number", "batches", "current", "live")

    def __init__(self) -> None:
        self.current: Iteration | None = None
        self.live: list[Iteration] = []
        self.batches = 0
        self._last_number = -1

    def next_number(self) -> int:
        """A number for one more loader: the same on every rank, because loaders are set up in the same order."""
        self._last_number += 1
        return self._last_number

    def of(self, loader: DataLoader[Any]) -> Iteration | None:
        """The innermost loop over one loader."""
        return next((loop for loop in reversed(self.live) if loop.loader is loader), None)

    def advanced_since(self, batches: int) -> Iteration | None:
        """The outermost loop that has handed out a batch since there were ``batches``; else the current one.

        A loop that began earlier is taken for the one around: a second loader that is read from within it, by
        ``next``, ends in its own time.
        """
        return next((loop for loop in self.live if loop.turn > batches), self.current)

    def forget(self, loop: Iteration) -> None:
        """A loop has ended: the one around it is the current one again."""
        self.live.remove(loop)
        if self.current is loop:
            self.current = self.live[-1] if self.live else None


class Iteration:
    """One loop over a loader.

    Attributes:
        loader: The loader.
        epoch: The epoch whose data it yields, from 0.
        position: The number of the batch that was handed out last, from 0; -1 before the first. A loop that is taken
            up where another process left it begins with the next one.
        turn: The number of that batch among those of all loops, from 1; 0 before the first.
        marks: For each batch that was fetched and not handed out yet: what ``mark`` gave before it was fetched.
        order: Of its samples.
        ended: Whether looking ahead has come to the end.
    """

    __slots__ = (
        "_ahead",
        "_mark",
        "_raw",
        "_total",
        "ended",
        "epoch",
        "loader",
        "marks",
        "order",
        "position",
        "turn",
    )

    def __init__(
        self,
        loader: DataLoader[Any],
        epoch: int,
        order: Order,
        *,
        position: int = -1,
        total: int | None = None,
        mark: Callable[[], Any] = lambda: None,
    ) -> None:
        self.loader = loader
        self.epoch = epoch
        self.order = order
        self.position = position
        self.turn = 0
        self.marks: deque[Any] = deque()
        self._mark = mark
        self._raw: Iterator[Any] | None = None
        self._ahead: deque[Any] = deque()
        self.ended = False
        self._total = total

    def run(
        self,
        raw: Iterator[Any],
        tracker: LoaderTracker,
        begin: Callable[[], None],
    ) -> Generator[Any, None, None]:
        """Hand out the batches of ``raw``.

        Args:
            raw: The batches.
            tracker: Is told at each batch whose turn it is.
            begin: Called before the first batch is asked for.
        """
        begin()
        self._raw = raw
        ahead = self._ahead
        tracker.live.append(self)
        try:
            for batch in raw:
                while True:
                    self.position += 1
                    tracker.current = self
                    tracker.batches = self.turn = tracker.batches + 1
                    yield batch
                    if not ahead:
                        break
                    batch = ahead.popleft()
                    self.marks.popleft()
            self._check_length()
        finally:
            self._raw = None
            ahead.clear()
            self.marks.clear()
            tracker.forget(self)

    @property
    def is_last_batch(self) -> bool:
        """Whether the batch that was handed out last is the last one of all."""
        return self.remaining(1) == 0

    def remaining(self, at_most: int) -> int:
        """How many batches follow the one that was handed out last; no more than ``at_most`` are counted.

        A loader without a length, or whose length is a guess (that of an ``IterableDataset`` is), is asked for as
        many batches ahead as have to be counted; they are kept and handed out when their turn comes.
        """
        total = self._length()
        if total is not None:
            return max(0, min(at_most, total - self.position - 1))
        while self._raw is not None and len(self._ahead) < at_most and not self.ended:
            mark = self._mark()
            try:
                self.keep([next(self._raw)], [mark])
            except StopIteration:
                self.ended = True
        return min(at_most, len(self._ahead))

    def keep(self, batches: Iterable[Any], marks: Iterable[Any]) -> None:
        """Keep batches that were fetched early, with their marks, until it is their turn."""
        self._ahead.extend(batches)
        self.marks.extend(marks)

    def _length(self) -> int | None:
        if self._total is None and not isinstance(self.loader.dataset, IterableDataset):
            try:
                self._total = len(self.loader)
            except (TypeError, NotImplementedError, AttributeError):
                return None
        return self._total

    def _check_length(self) -> None:
        if self._total is not None and self._total != self.position + 1:
            warnings.warn(
                f"len({type(self.loader).__qualname__}) is {self._total}, but it yielded {self.position + 1} batches. "
                "Where the last batch was asked for (accumulate does), the length was believed. Correct __len__ of "
                "its sampler or batch_sampler.",
                UserWarning,
                stacklevel=3,
            )
