"""The order in which one loop reads its samples, and how another process takes it up.

[Note: what was consumed] A loop that is taken up does not read again what its body was given before. The sampler is
run from the same random numbers, and as many of its batches as the body was given are passed over: not those that
were fetched early, by workers or to look ahead. The random numbers of the process are left alone meanwhile.

[Note: what an order follows from] Where samples are dealt out to ranks, from the seed and the epoch. Elsewhere the
sampler draws from generators of the process, so their states are kept: when it was asked to begin, and before its first
index.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from fabric_core.data.consumed import Consumed
from fabric_core.data.samplers import chain_of, dealt
from fabric_core.data.share import Share
from fabric_core.data.streams import Generators, Streams, preserved
from fabric_core.data.workers import Numbered

_TORCHS = {BatchSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler}
_UNMOVED = {BatchSampler, SequentialSampler}


class Indices:
    """The sampler as PyTorch's iterator over a loader sees it: what the order of the present loop makes of it.

    Args:
        sampler, numbered: As for `Order.draw`.
        order: Gives the order of the loop that begins.
    """

    def __init__(self, sampler: Any, order: Callable[[], Order], *, numbered: bool) -> None:
        self._sampler = sampler
        self._order = order
        self._numbered = numbered

    def __iter__(self) -> Iterator[Any]:
        return self._order().draw(self._sampler, self._numbered)

    def __len__(self) -> int:
        return len(self._sampler)


class Order:
    """The order of one loop.

    Args:
        epoch: Of which epoch, from 0.
        share: How it is dealt out.
        generators: Those of the user's from which a sampler may draw.
        seed: Of an order that is dealt out; ``None`` when the sampler draws it.
        key: From which the seeds of the samples follow, in workers; ``None`` when they are not seeded.

    Attributes:
        resumed: The state that this loop is taken up from.
        skip: How many batches are passed over; they count.
        rest: Where the sampler is not used: makes what is left of another one's order, in batches.
        begin: How many elements of the order were consumed before ``rest``.
        before: How many batches count as given before ``rest``.
        origin: What the order follows from, if not from what this loop captures: see `state_dict`.
        samplers: The states of the user's stateful samplers at the beginning.
        passed_over: Whether what was consumed has been passed over.
        reads_again: Whether it cannot be, and has to be read again: see `rearranged`.
        reader: PyTorch's iterator that this loop reads from.
        given: How many batches the loader's class has made of what it gives, where that is another iterator.
        start: The random numbers at the beginning, where workers are started that in the run which was interrupted were
            there already: to start them draws numbers, and must not.
    """

    def __init__(
        self,
        epoch: int,
        share: Share,
        *,
        generators: Generators = (),
        seed: int | None = None,
        key: int | None = None,
    ) -> None:
        self.epoch = epoch
        self.share = share
        self.key = key
        self.resumed: dict[str, Any] | None = None
        self.skip = 0
        self.rest: Callable[[], Iterator[Any]] | None = None
        self.begin = self.before = 0
        self.origin: dict[str, Any] | None = None if seed is None else {"seed": seed}
        self.samplers: list[Any] = []
        self.passed_over = False
        self.reads_again = False
        self.reader: weakref.ref[Any] | None = None
        self.given = 0
        self.start: Streams | None = None
        self._generators = generators
        self._saved: dict[str, Streams] = {}
        self._captured: dict[str, Streams] = {}
        self._creating = False
        self._begun = 0
        self._consumed = Consumed()

    # -- reading ----------------------------------------------------------------------------------------------------

    def draw(self, sampler: Any, numbered: bool) -> Iterator[Any]:
        """What the sampler yields, from where this loop begins. Called by PyTorch's iterator, sometimes twice.

        Args:
            sampler: Yields what is read at once, indices or lists of them.
            numbered: Whether who reads that understands `Numbered`.
        """
        if self.start is not None:
            self.start.restore(self._generators)
        if self.rest is not None:
            return self._handed_on(self.rest(), None, numbered)
        scope = None if self.origin is not None else drawn_from(sampler)
        if scope is None or is_lazy(sampler):
            return self._handed_on(iter(sampler), scope, numbered)
        with self._at("begun"):
            self._capture("begun", scope)
            indices = iter(sampler)
        return self._handed_on(indices, scope, numbered)

    def _handed_on(self, indices: Iterator[Any], scope: bool | None, numbered: bool) -> Iterator[Any]:
        self._begun += 1
        with self._at("first"):
            if scope is not None:
                self._capture("first", scope)
            passed = deque(enumerate(itertools.islice(indices, self.skip)), maxlen=1)
        # A class that lets its sampler begin once more begins at the beginning.
        skipped, self.skip = self.skip, 0
        if skipped:
            number, last = passed.pop() if passed else (-1, None)
            self._consumed.compare(last, found=number == skipped - 1)
        self._saved, self.start = {}, None
        self.passed_over = not self.reads_again
        key, note = self.key if numbered else None, self._consumed.note
        for number, batch in enumerate(indices, skipped):
            note(number, batch)
            yield batch if key is None else Numbered(batch, key, *self.share.numbers(self.begin, number))

    def counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        """What a loader's class gives; nothing has to be counted where that is PyTorch's iterator itself."""
        return batches if self.reader and batches is self.reader() else self._counted(batches)

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.given += 1
            yield batch

    @property
    def rearranged(self) -> bool:
        """Whether a loader's class has made other batches of those that its sampler says: dropped or repeated some."""
        reader = self.reader and self.reader()
        return bool(self.given) and getattr(reader, "_num_yielded", self.given) != self.given

    @property
    def is_lost(self) -> bool:
        """Whether the sampler has begun several times in this loop: random numbers are kept of the last time only."""
        return self.origin is None and bool(self._captured) and self._begun > 1

    def note_first(self) -> None:
        """Keep the random numbers before the first batch. Called where no sampler decides."""
        self._capture("first", torch_only=False)

    @contextmanager
    def from_the_first(self) -> Iterator[None]:
        """What is read inside is read from the random numbers before the first batch."""
        with preserved(self._generators), self._at("first"):
            yield

    @contextmanager
    def creation(self) -> Iterator[None]:
        """While an iterator over the loader is made: of a loop that is taken up, it must not draw any number."""
        if self.resumed is None or self._begun:
            yield
            return
        with preserved(self._generators):
            self._creating = True
            try:
                yield
            finally:
                self._creating = False

    @contextmanager
    def _at(self, moment: str) -> Iterator[None]:
        """From the random numbers of a moment of the loop that is taken up."""
        saved = self._saved.get(moment)
        if saved is None:
            yield
        elif self._creating:
            saved.restore(self._generators)
            yield
        else:
            with preserved(self._generators):
                saved.restore(self._generators)
                yield

    def _capture(self, moment: str, torch_only: bool) -> None:
        self._captured[moment] = self._saved.get(moment) or Streams.capture(
            self._generators, torch_only=torch_only
        )

    # -- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Tensors and plain values from which `take_up` goes on after some batches."""
        return {
            "batches": batches,
            "elements": self.begin + self.share.elements(batches - self.before),
            "key": self.key,
            "handed on": self.rest is not None,
            "rearranged": self.rearranged,
            "last": self._last(batches),
            "origin": self.origin
            or {moment: streams.state_dict() for moment, streams in self._captured.items()},
        }

    def _last(self, batches: int) -> dict[str, int] | None:
        """The index that was given last, and its number in the whole order; of a batch sampler, that of the batch."""
        if self._consumed.is_inherited(batches):
            return self._consumed.last
        number = batches - self.before - 1
        drawn = self._consumed.find(number)
        if drawn is None:
            return None
        first = self.begin + self.share.elements(number) + self.share.rank
        more = 0 if self.share.size is None else (drawn.samples - 1) * self.share.replicas
        return {"index": drawn.index, "number": first + more}

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on with an order that was dealt out alike."""
        self.resumed, self.key = state, state["key"]
        self._consumed.inherit(state["batches"], state.get("last"))
        self.reads_again = state["rearranged"]
        self.skip = 0 if self.reads_again else state["batches"]
        if "seed" not in state["origin"]:
            self._saved = moments_of(state)

    def take_over(
        self, state: dict[str, Any], elements: Callable[[], Iterator[Any]], drop_last: bool | None
    ) -> None:
        """Go on with an order that was dealt out otherwise.

        Args:
            state: Of the loop that is gone on with.
            elements: Makes the whole order.
            drop_last: Whether to leave out a last batch that is not full; ``None`` when elements are not batched.
        """
        self.resumed = {**state, "handed on": True}  # if it is saved again before anything was given
        self.key, self.origin, self.begin = state["key"], state["origin"], state["elements"]
        self.before = self.begin // self.share.elements(1)
        self._consumed.inherit(self.before, state.get("last"))

        def rest() -> Iterator[Any]:
            mine = dealt(self._left_of(elements()), self.share.replicas, self.share.rank)
            if drop_last is None:
                return mine
            return iter(BatchSampler(mine, self.share.size or 1, drop_last))

        self.rest = rest

    def _left_of(self, elements: Iterator[Any]) -> Iterator[Any]:
        """What all ranks have not consumed."""
        last = self._consumed.last
        before = itertools.islice(elements, last["number"] if last else 0, self.begin)
        for element in itertools.islice(before, 1):  # none, if the last round was filled up with it
            self._consumed.compare(element)
        deque(before, maxlen=0)  # passes over all of them
        return elements


def moments_of(state: dict[str, Any]) -> dict[str, Streams]:
    """The random numbers from which a sampler has drawn its order."""
    return {moment: Streams.from_state_dict(streams) for moment, streams in state["origin"].items()}


def drawn_from(sampler: Any) -> bool | None:
    """From what a sampler draws: ``True`` for PyTorch's streams alone, ``False`` for any, ``None`` for nothing."""
    kinds = {type(part) for part in chain_of(sampler)}
    return None if kinds <= _UNMOVED else kinds <= _TORCHS


def is_lazy(sampler: Any) -> bool:
    """Whether a sampler does nothing before it is asked for its first index."""
    return inspect.isgeneratorfunction(type(sampler).__iter__)
