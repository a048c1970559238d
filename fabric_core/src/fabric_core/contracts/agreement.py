"""What ranks that read and write files tell each other: through the store, and not by collectives.

A disk may take longer than a collective may; and a checkpoint may be written by a thread while the training goes on,
whose collectives must not meet others.

[Note: two threads and one store] The client of a store serves one thread at a time. While one waits in it for a key, an
other cannot even set the key that a peer of the first needs. So nobody waits in it here: a rank looks, sleeps, and
looks again. The thread that saves counts its agreements for itself: it may come before or after what the other does.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from fabric_core.background import in_background
from fabric_core.contracts.store import Store
from fabric_core.errors import CheckpointError, SetupError

__all__ = ["Agreement"]

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.25  # seconds between two looks at the store
_SHARE = 0.1  # of the time that was waited already, for the next pause
_QUIET = 10.0  # seconds that a rank waits for others to come to a verb before it says so
_MOST_NAMED = 8  # ranks in a message


class Agreement:
    """One rank's part in the agreements of a job. Every rank makes them in the same order.

    Args:
        store: What the ranks share; ``None`` when there is one only.
        rank: Who this is.
        world_size: How many ranks there are.
        patience: How many seconds a rank waits for another one to come to the same verb.
    """

    def __init__(self, store: Store | None, rank: int, world_size: int, patience: float = math.inf) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._patience = patience
        self._counts: Counter[str] = Counter()

    def meet(self, verb: str, what: str = "") -> None:
        """Wait until every rank has come to a verb, before anything is done in it. Called on every rank.

        After ten seconds, the first of those that wait warns of those that did not come.

        Args:
            verb: What the user has called.
            what: With what, for messages.

        Raises:
            SetupError: Some rank did not come within ``patience``, or came to another verb; on all that have come.
        """
        store = self._store
        if store is None:
            return
        key, call = self._next_key(), f"{verb}({what})"
        marks = [f"{key}/{rank}" for rank in range(self._world_size)]
        store.set(marks[self._rank], call)
        rule = f"{verb}() is called on every rank, and not under 'if fabric.is_global_zero'."

        def warn() -> None:
            missing = _missing(store, key, marks)
            if missing and self._rank == next(
                rank for rank in range(self._world_size) if rank not in missing
            ):
                warnings.warn(
                    f"Rank {self._rank} waits in {call}, and {_named(missing)} did not come to it for "
                    f"{_QUIET:.0f} s. {rule}",
                    UserWarning,
                    stacklevel=2,
                )

        awaited = marks if self._rank == 0 else [key]
        if not _wait(lambda: store.check(awaited), (_QUIET, warn), self._patience):
            raise SetupError(
                f"Rank {self._rank} has waited in {call} for {self._patience:.0f} s, and "
                f"{_named(_missing(store, key, marks))} did not come. {rule} Where a rank is busy for longer, the "
                "strategy's option 'timeout' says how long to wait for it."
            )
        if self._rank == 0:
            store.set(key, json.dumps(_mismatch([store.get(mark).decode() for mark in marks])))
            for mark in marks:
                store.delete_key(mark)
        mismatch = json.loads(_read(store, key))
        if mismatch is not None:
            raise SetupError(f"{mismatch} Every rank calls the same verbs in the same order.")

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
            reasons = {rank: json.loads(_taken(store, f"{key}/{rank}")) for rank in workers}
            failed = [(rank, reason) for rank, reason in reasons.items() if reason is not None]
            store.set(key, json.dumps(failed[0] if failed else None))
        return _outcome(_read(store, key))

    def on_ranks(self, ranks: Sequence[int], action: Callable[[], object], what: str, then: str = "") -> None:
        """Do something on some ranks, and succeed or fail on all of them. Called on every rank.

        It waits for all of these ranks, however long they take; so it must use no collectives (`jointly` may).

        Args:
            ranks: Who does it.
            action: What is done.
            what: The same in words, for messages, such as ``write the checkpoint 'run'``.
            then: What is added to the message.

        Raises:
            CheckpointError: It failed on one of them.
        """
        failure: Exception | None = None
        if self._rank in ranks:
            try:
                action()
            except Exception as error:  # the other ranks wait, and have to be told
                failure = error
        failed = self.first_failure(failure, ranks)
        if failed is not None:
            raise CheckpointError(f"{_blaming(failed, what)}{then}") from failure

    @contextmanager
    def jointly(self, what: str) -> Iterator[None]:
        """What is done in this context succeeds on all ranks or fails on all. Entered by every rank.

        It may use collectives. So who fails says so and waits for nobody: the others may be inside of one, and would
        wait for it. Who is done waits for the others, as long as it takes. There must be no other agreement in it.

        Args:
            what: What is done, for messages, such as ``load the checkpoint 'run'``.

        Raises:
            CheckpointError: It failed on another rank, and here not at all or later and for another reason, such as a
                collective to which that rank did not come.
        """
        store = self._store
        if store is None:
            yield
            return
        key = self._next_key()
        try:
            yield
        except Exception as error:
            first = _told(store, key, (self._rank, _reason(error)))
            if first is None:
                raise
            raise CheckpointError(_blaming(first, what)) from error
        first = self._awaited(store, key, what)
        if first is not None:
            raise CheckpointError(_blaming(first, what))

    def _awaited(self, store: Store, key: str, what: str) -> tuple[int, str] | None:
        """Say that this rank is done, and wait until all are, or one has failed."""
        marks = [f"{key}/{rank}" for rank in range(self._world_size)]
        try:
            store.set(marks[self._rank], "done")
            if self._rank == 0:
                _wait(lambda: store.check([key]) or store.check(marks))
                if not store.check([key]):  # all are done, and nobody can fail any more
                    store.set(key, json.dumps(None))
                    for mark in marks:
                        store.delete_key(mark)
            return _outcome(_read(store, key))
        except Exception as error:  # of the store: its server ends with rank 0, or with the launcher
            raise CheckpointError(
                f"This rank could {what}, but not learn whether all others could, because the store of the job is gone "
                f"({error}). The first error is that of rank 0."
            ) from error

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


def _told(store: Store, key: str, failure: tuple[int, str]) -> tuple[int, str] | None:
    """Say that a rank has failed, unless another one has before it: which one, if for another reason."""
    with suppress(Exception):  # of the store; the failure itself says more
        if not store.check([key]):
            store.set(key, json.dumps(failure))
            return None
        first = _outcome(store.get(key).decode())
        return None if first is None or first[1] == failure[1] else first
    return None


def _outcome(text: str) -> tuple[int, str] | None:
    outcome = json.loads(text)
    return None if outcome is None else (outcome[0], outcome[1])


def _blaming(failure: tuple[int, str], what: str) -> str:
    return f"Rank {failure[0]} could not {what}: {failure[1]}"


def _read(store: Store, key: str) -> str:
    """The value of a key, as soon as somebody has set it."""
    _wait(lambda: store.check([key]))
    return store.get(key).decode()


def _taken(store: Store, key: str) -> str:
    """The same of a key that nobody else reads: it is deleted, so that what the store holds does not grow."""
    value = _read(store, key)
    store.delete_key(key)
    return value


def _wait(
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


def _missing(store: Store, key: str, marks: Sequence[str]) -> list[int]:
    """The ranks that have left no mark; none when all had, and the marks are deleted."""
    missing = [rank for rank, mark in enumerate(marks) if not store.check([mark])]
    return [] if store.check([key]) else missing


def _named(ranks: Sequence[int]) -> str:
    """Some ranks in a sentence."""
    shown = ", ".join(map(str, ranks[:_MOST_NAMED])) + (", …" if len(ranks) > _MOST_NAMED else "")
    return f"rank {shown}" if len(ranks) == 1 else f"the ranks {shown}"


def _mismatch(calls: Sequence[str]) -> str | None:
    """What is wrong when the ranks have called different verbs."""
    other = next((rank for rank, call in enumerate(calls) if _verb(call) != _verb(calls[0])), None)
    return None if other is None else f"Rank 0 has called {calls[0]}, and rank {other} {calls[other]}."


def _verb(call: str) -> str:
    return call.partition("(")[0]


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
