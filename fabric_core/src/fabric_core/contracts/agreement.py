"""What ranks that read and write files tell each other: through the store, and not by collectives.

A disk may take longer than a collective may; and a checkpoint may be written by a thread while the training goes on,
whose collectives must not meet others.

[Note: two threads and one store] The client of a store serves one thread at a time. While one waits in it for a key, an
other cannot even set the key that a peer of the first needs. So nobody waits in it here: a rank looks, sleeps, and
looks again. The thread that saves counts its agreements for itself: it may come before or after what the other does.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence

from fabric_core.background import in_background
from fabric_core.contracts.store import Store
from fabric_core.errors import CheckpointError

__all__ = ["Agreement"]

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.25  # seconds between two looks at the store
_SHARE = 0.1  # of the time that was waited already, for the next pause


class Agreement:
    """One rank's part in the agreements of a job. Every rank makes them in the same order.

    Args:
        store: What the ranks share; ``None`` when there is one only.
        rank: Who this is.
    """

    def __init__(self, store: Store | None, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._counts: Counter[str] = Counter()

    def first_failure(self, failure: Exception | None, workers: Sequence[int]) -> tuple[int, str] | None:
        """The first of some ranks that has failed, and why. Called on every rank, by ``workers`` when they are done.

        It may take as long as it takes.
        """
        own, store = None if failure is None else _reason(failure), self._store
        if store is None:
            return None if own is None else (self._rank, own)
        key = self._next_key()
        if self._rank in workers:
            store.set(f"{key}/{self._rank}", json.dumps(own))
        if self._rank == 0:
            reasons = {rank: json.loads(_read(store, f"{key}/{rank}")) for rank in workers}
            failed = [(rank, reason) for rank, reason in reasons.items() if reason is not None]
            store.set(key, json.dumps(failed[0] if failed else None))
        first = json.loads(_read(store, key))
        return None if first is None else (first[0], first[1])

    def of_rank_zero(self, value: str) -> str:
        """The value that rank 0 has given. Called on every rank; what the others give is ignored."""
        if self._store is None:
            return value
        key = self._next_key()
        if self._rank == 0:
            self._store.set(key, value)
        return _read(self._store, key)

    def _next_key(self) -> str:
        thread = "background" if in_background() else "verbs"
        self._counts[thread] += 1
        return f"agreement/{thread}/{self._counts[thread]}"


def _read(store: Store, key: str) -> str:
    """The value of a key, as soon as somebody has set it; see [Note: two threads and one store]."""
    began = time.monotonic()
    while not store.check([key]):
        waited = time.monotonic() - began
        time.sleep(min(max(_SHORTEST_PAUSE, _SHARE * waited), _LONGEST_PAUSE))
    return store.get(key).decode()


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
