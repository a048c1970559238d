"""What stands, while a file is read without trust, for values that may not be made then; and how the true ones come in.

[Note: stand-ins] The calls in a file are made while it is read, with arguments of its choice. A type that could do harm
there (an array over pointers, a range of 10¹² numbers that something else then counts out) is read as a `StandIn`,
which only takes notes. When all is read, `resolved` puts the true values in their places.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

_CONTAINERS = (dict, list, tuple, set, frozenset, Namespace, SimpleNamespace)

_UNFOLDED = 1_000_000
"""How many values containers may seem to hold, counted once for each place in which they are, before it is compared
with how many there really are."""


class StandIn(ABC):
    """Stands for a value until all is read."""

    @abstractmethod
    def real(self) -> Any:
        """The true value."""


class RangeStandIn(StandIn):
    """Stands for ``range``: the true one could be counted out, into a set of all its numbers."""

    def __init__(self, *bounds: Any) -> None:
        self._range = range(*bounds)

    def real(self) -> range:
        """The true range."""
        return self._range


def no_bytes() -> bytes:
    """Stands for ``bytes``, which pickles call for the empty ones only; a number would ask for so many zeros."""
    return b""


def resolved(loaded: Any) -> Any:
    """What was loaded, with the true values in the place of what stood for them. Containers change in place.

    Raises:
        pickle.UnpicklingError: Containers hold themselves, or each other so often or so deep that going through them
            would not end.
    """
    walk = _Walk()
    try:
        value, size = walk.through(loaded)
    except RecursionError as error:
        raise pickle.UnpicklingError("its containers lie too deep inside of each other") from error
    if size > _UNFOLDED + 100 * walk.visited:
        raise pickle.UnpicklingError(
            "its containers hold each other so often that they would unfold without end"
        )
    return value


class _Walk:
    """Goes through containers, through each once."""

    def __init__(self) -> None:
        self.visited = 0
        self._done: dict[
            int, tuple[Any, Any, int]
        ] = {}  # the old one, too: as long as it lives, its id is its own
        self._open: set[int] = set()

    def through(self, value: Any) -> tuple[Any, int]:
        """The value with the true ones in it, and how many it would be unfolded."""
        if isinstance(value, StandIn):
            return value.real(), 1
        if not isinstance(value, _CONTAINERS):
            self.visited += 1
            return value, 1
        number = id(value)
        if number in self._open:
            raise pickle.UnpicklingError("one of its containers holds itself")
        if number not in self._done:
            self._open.add(number)
            self._done[number] = (value, *self._renewed(value))
            self._open.remove(number)
        _, new, size = self._done[number]
        return new, size

    def _renewed(self, container: Any) -> tuple[Any, int]:
        self.visited += 1
        if isinstance(container, Namespace | SimpleNamespace):
            return container, self.through(vars(container))[1]
        keys = list(container) if isinstance(container, dict) else None
        entries = list(container.values() if keys is not None else container)
        found = [self.through(entry) for entry in entries]
        new, size = [value for value, _ in found], 1 + sum(size for _, size in found)
        if all(after is before for after, before in zip(new, entries, strict=True)):
            return container, size
        if keys is not None:
            container.update(zip(keys, new, strict=True))
        elif isinstance(container, list):
            container[:] = new
        else:
            container = _rebuilt(container, iter(new))
        return container, size


def _rebuilt(container: Any, entries: Iterator[Any]) -> Any:
    kind = type(container)
    return kind(entries) if kind in (tuple, set, frozenset) else container
