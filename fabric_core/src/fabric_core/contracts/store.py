"""The store: where the ranks of a job leave word for each other, outside of collectives and their timeouts.

[Note: two threads and one store] The client of a store serves one thread at a time. While one waits in it for a key, an
other cannot even set the key that a peer of the first needs. So nobody waits in it here: a rank looks, sleeps, and
looks again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["Store", "read_when_there", "wait_until"]

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.25  # seconds between two looks at the store
_SHARE = 0.1  # of the time that was waited already, for the next pause


class Store(Protocol):
    """A key-value store that all ranks share: the part of ``torch.distributed.Store`` that the core uses."""

    def set(self, key: str, value: str, /) -> None:
        """Publish a value."""

    def get(self, key: str, /) -> bytes:
        """Wait for a key and return its value."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter, which begins at 0, and return what it is now. Nobody else's addition gets lost."""

    def check(self, keys: list[str], /) -> bool:
        """Whether every key is there, without waiting."""

    def delete_key(self, key: str, /) -> bool:
        """Forget a key and its value. Returns whether it was there."""


def read_when_there(store: Store, key: str) -> str:
    """The value of a key, however long the rank that sets it is at work. One that dies ends the job earlier."""
    wait_until(lambda: store.check([key]))
    return store.get(key).decode()


def wait_until(
    condition: Callable[[], bool],
    once: tuple[float, Callable[[], None]] | None = None,
    patience: float = math.inf,
) -> bool:
    """Wait until something is so; see [Note: two threads and one store].

    Args:
        condition: What.
        once: What to do once, when so many seconds have gone by.
        patience: Seconds after which to give up.

    Returns:
        Whether it is so.
    """
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        if waited > patience:
            return False
        if once is not None and waited > once[0]:
            once[1]()
            once = None
        time.sleep(min(max(_SHORTEST_PAUSE, _SHARE * waited), _LONGEST_PAUSE))
    return True
