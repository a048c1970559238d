"""How ranks meet: in a store that may hold the traces of others who met there before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from fabric_backends.rendezvous import meet
from fabric_core.contracts.cluster_environment import ClusterEnvironment
from fabric_core.errors import LaunchError

SECONDS = timedelta(seconds=10)


class Room(ClusterEnvironment):
    """One rank of a job whose store is in this process; every instance is another meeting point."""

    creates_processes_externally = True
    main_address = "here"

    def __init__(self, rank: int, world_size: int, store: Any, port: int) -> None:
        self._numbers = rank, world_size, port
        self._store = store

    @property
    def main_port(self) -> int:
        return self._numbers[2]

    def world_size(self) -> int:
        return self._numbers[1]

    def global_rank(self) -> int:
        return self._numbers[0]

    def local_rank(self) -> int:
        return self._numbers[0]

    def node_rank(self) -> int:
        return 0

    def shared_store(self, timeout: timedelta) -> Any:
        return self._store


def all_at_once(functions: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(functions)

    def run(index: int) -> None:
        try:
            results[index] = functions[index]()
        except LaunchError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_ranks_that_meet_again_find_no_traces_of_the_last_time() -> None:
    store = dist.HashStore()
    for attempt in range(3):
        rooms = [Room(rank, 4, store, 1) for rank in range(4)]
        stores = all_at_once([lambda room=room: meet(room, timeout=SECONDS) for room in rooms])
        assert not any(meeting.check(["address"]) for meeting in stores)
        stores[attempt].set("address", str(attempt))
        assert {meeting.get("address") for meeting in stores} == {str(attempt).encode()}


def test_a_dead_rank_that_asked_before_does_not_count_as_present() -> None:
    store = dist.HashStore()
    store.set(f"fabric/come/{store.add('fabric/come', 1)}", "token of the dead")
    store.add("fabric/come", 1)  # and one died between the two
    with pytest.raises(LaunchError, match="for 3 ranks, but ranks 1, 2 did not come"):
        meet(Room(0, 3, store, 2), timeout=timedelta(seconds=0.2))


def test_a_rank_is_not_deceived_by_the_answer_to_another() -> None:
    store = dist.HashStore()
    store.set("fabric/answer/token of the dead", "fabric/old")
    with pytest.raises(LaunchError, match="Rank 1 could not meet rank 0 at here port 3"):
        meet(Room(1, 2, store, 3), timeout=timedelta(seconds=0.2))


def test_who_is_alone_waits_for_nobody() -> None:
    assert isinstance(meet(Room(0, 1, None, 4), timeout=SECONDS), dist.HashStore)


def test_a_program_without_a_fabric_meets_by_the_variables_alone(programs: Any) -> None:
    """As under torchrun, though the port at which Fabrics meet is listened on already."""
    found = programs.answers_of("""
dist.init_process_group("gloo")
ranks = torch.tensor([float(rank + 1)])
dist.all_reduce(ranks)
answer(ranks.item())
dist.destroy_process_group()
""")
    assert found == [3.0, 3.0]
