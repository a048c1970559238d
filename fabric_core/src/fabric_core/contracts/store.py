"""The store: where the ranks of a job leave word for each other, outside of collectives and their timeouts."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

__all__ = ["Store", "read_when_there"]

FOREVER = timedelta(days=365)
"""How long to wait for a rank that is at work. One that dies ends the job earlier."""


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

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        """Wait until every key is there, for at most ``timeout``."""


def read_when_there(store: Store, key: str) -> str:
    """The value of a key, however long the rank that sets it is at work."""
    store.wait([key], FOREVER)
    return store.get(key).decode()
