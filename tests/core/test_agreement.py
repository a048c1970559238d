"""What ranks tell each other through the store: who fails tells it at once, and who is done waits for the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from fabric_core.contracts.agreement import Agreement, _named
from fabric_core.errors import CheckpointError, CheckpointKeyError, SetupError

RANKS = 3


@pytest.fixture
def ranks() -> Iterator[Callable[[Callable[[Agreement, int], Any]], list[Any]]]:
    """Does something on several ranks at once, as often as asked, and returns the result or error of each."""
    store = HashStore()
    agreements = [Agreement(store, rank, RANKS) for rank in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as pool:

        def on_all(action: Callable[[Agreement, int], Any]) -> list[Any]:
            futures = [pool.submit(action, agreement, rank) for rank, agreement in enumerate(agreements)]
            return [future.exception(60) or future.result() for future in futures]

        yield on_all


def test_who_fails_does_not_wait_for_the_others(ranks: Any) -> None:
    raised = threading.Event()

    def work(agreement: Agreement, rank: int) -> None:
        try:
            with agreement.jointly("load it"):
                if rank == 1:
                    raise CheckpointError("chunk 5 is damaged")
                assert raised.wait(60)  # a collective: rank 1 has to be out of the context before it can end
                if rank == 2:
                    raise RuntimeError("the connection was closed by rank 1")
        finally:
            if rank == 1:
                raised.set()

    zero, one, two = ranks(work)
    assert str(one) == "chunk 5 is damaged"
    for told in (zero, two):
        assert type(told) is CheckpointError
        assert str(told) == "Rank 1 could not load it: chunk 5 is damaged"
    assert isinstance(two.__cause__, RuntimeError)


def test_who_is_done_waits_until_all_are(ranks: Any) -> None:
    others = threading.Barrier(RANKS)
    done: list[int] = []

    def work(agreement: Agreement, rank: int) -> list[int]:
        others.wait(60)
        with agreement.jointly("load it"):
            threading.Event().wait(0.2 * rank)
            done.append(rank)
        return list(done)

    assert [sorted(seen) for seen in ranks(work)] == [[0, 1, 2]] * RANKS


def test_a_failure_that_all_ranks_find_keeps_its_type(ranks: Any) -> None:
    def work(agreement: Agreement, rank: int) -> None:
        with agreement.jointly("load it"):
            raise CheckpointKeyError("no 'model'")

    assert [type(error) for error in ranks(work)] == [CheckpointKeyError] * RANKS


def test_after_a_failure_the_ranks_still_agree(ranks: Any) -> None:
    def work(agreement: Agreement, rank: int) -> tuple[str, Any]:
        with pytest.raises(CheckpointError), agreement.jointly("load it"):
            if rank == 2:
                raise CheckpointError("damaged")
        with agreement.jointly("load another"):
            pass
        failure = OSError("disk full") if rank == 1 else None
        return agreement.of_rank_zero(f"of {rank}"), agreement.first_failure(failure, range(RANKS))

    assert ranks(work) == [("of 0", (1, "OSError: disk full"))] * RANKS


def test_a_store_that_is_gone_is_no_success() -> None:
    class Gone(HashStore):
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("failed to recv, got 0 bytes")

    with (
        pytest.raises(CheckpointError, match="the store of the job is gone"),
        Agreement(Gone(), 1, 2).jointly("load it"),
    ):
        pass
    with pytest.raises(SetupError, match="the store of the job is gone"):
        Agreement(Gone(), 1, 2).meet("save")
    with pytest.raises(CheckpointError, match="damaged"), Agreement(Gone(), 1, 2).jointly("load it"):
        raise CheckpointError("damaged")


def test_the_store_does_not_grow_with_the_number_of_ranks() -> None:
    store = HashStore()
    agreements = [Agreement(store, rank, RANKS) for rank in range(RANKS)]

    def agree(agreement: Agreement) -> None:
        agreement.first_failure(None, range(RANKS))
        with agreement.jointly("load it"):
            pass
        agreement.on_ranks([1], lambda: None, "write it")
        agreement.meet("save")

    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(agree, agreements))
    assert store.num_keys() <= 4  # one for each agreement


def test_what_some_ranks_do_fails_on_all(ranks: Any) -> None:
    def work(agreement: Agreement, rank: int) -> None:
        def write() -> None:
            raise OSError(f"disk {rank} is full")

        agreement.on_ranks([1, 2], write, "write it", ". Nothing is lost.")

    for error in ranks(work):
        assert type(error) is CheckpointError
        assert str(error) == "Rank 1 could not write it: OSError: disk 1 is full. Nothing is lost."


@pytest.mark.parametrize("reason", ["disk 1 is full", "disk 1 is full.", "disk 1 is full. Nothing is lost."])
def test_what_is_added_to_a_failure_is_said_once(reason: str) -> None:
    def write() -> None:
        raise CheckpointError(reason)

    with pytest.raises(CheckpointError) as told:
        Agreement(None, 0, 1).on_ranks([0], write, "write it", ". Nothing is lost.")
    assert str(told.value) == "Rank 0 could not write it: disk 1 is full. Nothing is lost."


# -- coming to a verb ---------------------------------------------------------------------------------------------


def test_nobody_goes_on_before_all_have_come(ranks: Any) -> None:
    come: list[int] = []

    def work(agreement: Agreement, rank: int) -> list[int]:
        threading.Event().wait(0.2 * rank)
        come.append(rank)
        agreement.meet("save", "'run'")
        return sorted(come)

    assert ranks(work) == [[0, 1, 2]] * RANKS


@pytest.mark.parametrize("absent", range(RANKS))
def test_a_rank_that_does_not_come_is_named_once_and_then_it_is_an_error(
    absent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fabric_core.contracts.agreement._QUIET", 0.1)
    store = HashStore()

    def work(rank: int) -> None:
        if rank != absent:
            Agreement(store, rank, RANKS, patience=1.0).meet("save", "'run'")

    with (
        pytest.warns(UserWarning, match=f"Rank . waits in save.'run'., and rank {absent} did") as noted,
        ThreadPoolExecutor(RANKS) as pool,
    ):
        errors = [future.exception(60) for future in [pool.submit(work, rank) for rank in range(RANKS)]]
    [note] = noted
    assert str(note.message)[len("Rank 0") :] == (
        f" waits in save('run'), and rank {absent} did not come to it for 0 s. save() is called on every "
        "rank, and not under 'if fabric.is_global_zero'."
    )
    for rank, error in enumerate(errors):
        expected = f"Rank {rank} has waited in save('run') for 1 s, and rank {absent} did not come. save() is called on"
        assert error is None if rank == absent else str(error).startswith(expected)
        assert rank == absent or type(error) is SetupError


def test_ranks_that_call_different_verbs_are_told(ranks: Any) -> None:
    def work(agreement: Agreement, rank: int) -> str:
        agreement.meet("save", f"'on {rank}'")  # names may differ: that of rank 0 counts
        with pytest.raises(SetupError) as told:
            agreement.meet("load" if rank == 2 else "save", "'run'")
        agreement.meet("save")
        return str(told.value)

    message = "Rank 0 has called save('run'), and rank 2 load('run')."
    assert ranks(work) == [f"{message} Every rank calls the same verbs in the same order."] * RANKS


def test_many_ranks_are_not_all_named() -> None:
    assert _named(range(3)) == "the ranks 0, 1, 2"
    assert _named(range(5000)) == "the ranks 0, 1, 2, 3, 4, 5, 6, 7, …"
