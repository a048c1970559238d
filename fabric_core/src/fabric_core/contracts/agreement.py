"""What ranks that read and write files tell each other: through the store, and not by collectives.

A disk may take longer than a collective may; and a checkpoint may be written by a thread while the training goes on,
whose collectives must not meet others.

Two threads use one store, see [Note: two threads and one store]. The one that saves counts its agreements for itself:
it may come before or after what the other does.

[Note: the last one tells] No rank asks for the word of each of the others, which would take rank 0 of a large job
seconds. Those that come count themselves, and the last one tells all the outcome. Only where something is wrong does
somebody look through all ranks, for the message; one alone, and the others read what it has found.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from fabric_core.background import in_background
from fabric_core.contracts.store import Store, read_when_there, wait_until
from fabric_core.errors import CheckpointError, SetupError

__all__ = ["Agreement"]

_QUIET = 10.0  # seconds that a rank waits for others to come to a verb before it says so
_MOST_NAMED = 8  # ranks in a message


@contextmanager
def _while_the_store_lives() -> Iterator[None]:
    """What is done in this context fails with a sentence when the store is gone, whose server ends with rank 0."""
    try:
        yield
    except (SetupError, Warning):
        raise
    except Exception as error:
        raise SetupError(
            f"The ranks cannot meet, because the store of the job is gone ({error}). The first error is that of rank 0."
        ) from error


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

    @_while_the_store_lives()
    def meet(self, verb: str, what: str = "") -> None:
        """Wait until every rank has come to a verb, before anything is done in it. Called on every rank.

        After ten seconds, one of those that wait warns of those that did not come.

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
        rule = f"{verb}() is called on every rank, and not under 'if fabric.is_global_zero'."
        store.set(f"{key}/{self._rank}", call)
        store.add(f"{key}/{verb}", 1)
        if self._is_last(store, key, self._world_size):
            same = _counted(store, f"{key}/{verb}") == self._world_size
            store.set(key, json.dumps(None if same else _mismatch(store, key, self._world_size)))

        def warn() -> None:
            if store.add(f"{key}/warned", 1) == 1 and (missing := self._missing(store, key)):
                warnings.warn(
                    f"Rank {self._rank} waits in {call}, and {_named(missing)} did not come to it for "
                    f"{_QUIET:.0f} s. {rule}",
                    UserWarning,
                    stacklevel=2,
                )

        if not wait_until(lambda: store.check([key]), (_QUIET, warn), self._patience):
            raise SetupError(
                f"Rank {self._rank} has waited in {call} for {self._patience:.0f} s, and "
                f"{self._absent(store, key)} did not come. {rule} Where a rank is busy for longer, the "
                "strategy's option 'timeout' says how long to wait for it."
            )
        store.delete_key(f"{key}/{self._rank}")
        mismatch = json.loads(read_when_there(store, key))
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
            if own is not None:
                store.set(f"{key}/{self._rank}", own)
                store.add(f"{key}/failed", 1)
            if self._is_last(store, key, len(workers)):
                store.set(key, json.dumps(_first_of(store, key, workers)))
        return _outcome(read_when_there(store, key)) if workers else None

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
            raise CheckpointError(_followed(_blaming(failed, what), then)) from failure

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
        try:
            if self._is_last(store, key, self._world_size):  # all are done, and nobody can fail any more
                store.set(key, json.dumps(None))
            return _outcome(read_when_there(store, key))
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
        return read_when_there(self._store, key)

    def _is_last(self, store: Store, key: str, number: int) -> bool:
        """Count this rank among those that have come; whether it is the last of so many."""
        if store.add(f"{key}/come", 1) < number:
            return False
        store.delete_key(f"{key}/come")
        return True

    def _missing(self, store: Store, key: str) -> list[int]:
        """The ranks that have not come; none when all had, and are leaving."""
        missing = [rank for rank in range(self._world_size) if not store.check([f"{key}/{rank}"])]
        return [] if store.check([key]) else missing

    def _absent(self, store: Store, key: str) -> str:
        """The same in words, for ranks that all give up at about the same time."""
        if store.add(f"{key}/asked", 1) == 1:
            store.set(f"{key}/absent", _named(self._missing(store, key)))
        found = wait_until(lambda: store.check([f"{key}/absent"]), patience=_QUIET)
        return store.get(f"{key}/absent").decode() if found else "some ranks"

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


def _followed(text: str, then: str) -> str:
    """A sentence with what is added to it, which may be said in it already."""
    return f"{text.rstrip('.').removesuffix(then.rstrip('.'))}{then}" if then else text


def _counted(store: Store, key: str) -> int:
    """How far a counter has come; it is not needed any more."""
    number = store.add(key, 0)
    store.delete_key(key)
    return number


def _first_of(store: Store, key: str, workers: Sequence[int]) -> tuple[int, str] | None:
    """The first of some ranks that has failed, when all of them have said so if they have."""
    if not _counted(store, f"{key}/failed"):
        return None
    failed = [rank for rank in workers if store.check([f"{key}/{rank}"])]
    reasons = [store.get(f"{key}/{rank}").decode() for rank in failed]
    for rank in failed:
        store.delete_key(f"{key}/{rank}")
    return failed[0], reasons[0]


def _named(ranks: Sequence[int]) -> str:
    """Some ranks in a sentence."""
    shown = ", ".join(map(str, ranks[:_MOST_NAMED])) + (", …" if len(ranks) > _MOST_NAMED else "")
    return f"rank {shown}" if len(ranks) == 1 else f"the ranks {shown}"


def _mismatch(store: Store, key: str, world_size: int) -> str:
    """What is wrong when the ranks have called different verbs."""
    calls = [store.get(f"{key}/{rank}").decode() for rank in range(world_size)]
    other = next(rank for rank, call in enumerate(calls) if _verb(call) != _verb(calls[0]))
    return f"Rank 0 has called {calls[0]}, and rank {other} {calls[other]}."


def _verb(call: str) -> str:
    return call.partition("(")[0]


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
