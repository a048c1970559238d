"""The comparison of plans before the first collective, with ranks that are threads around one store."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fabric_core import (
    ClusterEnvironment,
    Fabric,
    PlanMismatchError,
    Registry,
    Strategy,
    StrategySpec,
    hookimpl,
)
from fabric_core.consensus import ADVICE, check_same_plan, compare


class FakeStore:
    """A store in this process: ``get`` waits, as that of PyTorch does."""

    def __init__(self, patience: float = 10.0) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()
        self.patience = patience
        self.sets, self.gets, self.adds, self.checks = 0, 0, 0, 0

    def set(self, key: str, value: str, /) -> None:
        with self.changed:
            assert key not in self.values
            self.sets += 1
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key: str, /) -> bytes:
        with self.changed:
            self.gets += 1
            if not self.changed.wait_for(lambda: key in self.values, self.patience):
                raise TimeoutError(key)
            return self.values[key].encode()

    def add(self, key: str, amount: int, /) -> int:
        with self.changed:
            self.adds += 1
            self.values[key] = str(int(self.values.get(key, "0")) + amount)
            return int(self.values[key])

    def check(self, keys: list[str], /) -> bool:
        with self.changed:
            self.checks += 1
            return all(key in self.values for key in keys)


PLAN = {
    "strategy": "ddp (from acme 1.0)",
    "precision": "32-true (from fabric-core 0.1)",
    "number of nodes": "2",
}


@pytest.fixture(autouse=True)
def _one_number_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank is a process of its own and counts by itself; here they are threads of one."""
    counts = threading.local()

    class PerThread:
        def __next__(self) -> int:
            counts.value = getattr(counts, "value", -1) + 1
            return int(counts.value)

    monkeypatch.setattr("fabric_core.consensus._numbers", PerThread())


def outcomes(plans: list[Mapping[str, str]], per_node: int = 2, store: FakeStore | None = None) -> list[str]:
    """What each rank hears; empty where it is content."""
    shared = store or FakeStore()

    def rank(number: int) -> str:
        try:
            check_same_plan(
                shared, plans[number], rank=number, world_size=len(plans), node_rank=number // per_node
            )
        except PlanMismatchError as error:
            return str(error)
        return ""

    results: list[str] = [""] * len(plans)

    def run(number: int) -> None:
        results[number] = rank(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_ranks_with_the_same_plan_go_on(ranks: int) -> None:
    assert outcomes([dict(PLAN) for _ in range(ranks)]) == [""] * ranks


def test_every_rank_hears_the_same_about_a_difference() -> None:
    other = {**PLAN, "strategy": "ddp (from acme 1.1)"}
    heard = outcomes([PLAN, PLAN, PLAN, other])
    assert len(set(heard)) == 1
    assert heard[0].splitlines() == [
        "The ranks of this job decided differently: 1 of 4 differ from rank 0.",
        "  strategy: rank 0 (node 0) has ddp (from acme 1.0); rank 3 (node 1) has ddp (from acme 1.1)",
        ADVICE,
    ]


def test_a_part_that_one_side_does_not_have_is_shown_as_none() -> None:
    message = compare([{"node": 0, "plan": PLAN}, {"node": 0, "plan": {**PLAN, "strategy options": "{}"}}])  # type: ignore[dict-item]
    assert "strategy options: rank 0 (node 0) has none; rank 1 (node 0) has {}" in message


def test_all_differences_of_the_first_rank_that_differs_are_shown() -> None:
    plans = [PLAN, {**PLAN, "strategy": "x", "precision": "y"}, {**PLAN, "number of nodes": "3"}]
    message = compare([{"node": n, "plan": dict(plan)} for n, plan in enumerate(plans)])  # type: ignore[dict-item]
    assert "2 of 3 differ" in message
    assert [line.strip().split(":")[0] for line in message.splitlines()[1:-1]] == ["precision", "strategy"]


@pytest.mark.parametrize("ranks", [8, 16])
def test_a_rank_does_the_same_few_things_whatever_the_number_of_ranks(ranks: int) -> None:
    store = FakeStore()
    outcomes([PLAN] * ranks, store=store)
    assert (store.sets, store.gets) == (
        2,
        ranks + ranks - 1,
    )  # the first plan and the verdict; all but the last read both
    assert (store.adds, store.checks) == (ranks + 1, 0)


def test_one_store_serves_several_comparisons() -> None:
    store = FakeStore()
    with ThreadPoolExecutor(max_workers=1) as rank:
        for _ in range(3):
            rank.submit(check_same_plan, store, PLAN, rank=0, world_size=1, node_rank=0).result()
    assert len({key.rpartition("/")[0] for key in store.values}) == 3


class Meeting(Strategy):
    """A strategy of several ranks, as far as the store goes."""

    shared: FakeStore
    connected: list[int]

    def __init__(self, level: int = 0) -> None:
        self.level = level

    @property
    def world_size(self) -> int:
        return 2

    @property
    def global_rank(self) -> int:
        return self.surroundings.cluster_environment.global_rank()

    @property
    def local_rank(self) -> int:
        return self.global_rank

    @property
    def store(self) -> FakeStore:
        return self.shared

    def connect(self) -> None:
        self.connected.append(self.global_rank)


class Rank(ClusterEnvironment):
    """The environment of one rank of two."""

    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = 0

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def world_size(self) -> int:
        return 2

    def global_rank(self) -> int:
        return self.rank

    def local_rank(self) -> int:
        return self.rank

    def node_rank(self) -> int:
        return 0


class Parts:
    @hookimpl
    def fabric_strategies(self) -> Iterator[StrategySpec]:
        yield StrategySpec("meeting", Meeting, supports=("*",), launcher=None)


@pytest.fixture
def meet(core_alone: Registry) -> Callable[..., list[Any]]:
    """Let two ranks meet; what each one gets."""
    core_alone.register(Parts(), distribution="acme", version="1.0")
    Meeting.shared, Meeting.connected = FakeStore(), []

    def run(*flags: dict[str, Any]) -> list[Any]:
        def rank(number: int) -> Any:
            fabric = Fabric(
                accelerator="cpu", strategy="meeting", devices=2, plugins=Rank(number), **flags[number]
            )
            try:
                fabric.barrier()
            except PlanMismatchError as error:
                return str(error)
            return fabric.world_size

        with ThreadPoolExecutor(max_workers=2) as ranks:
            return list(ranks.map(rank, range(2)))

    return run


def test_a_fabric_compares_before_it_joins(meet: Callable[..., list[Any]]) -> None:
    assert meet({}, {}) == [2, 2]
    assert sorted(Meeting.connected) == [0, 1]
    posted = json.loads(next(iter(Meeting.shared.values.values())))
    assert posted["plan"]["strategy"] == "meeting (from acme 1.0)"


def test_ranks_that_were_started_with_different_options_do_not_join(meet: Callable[..., list[Any]]) -> None:
    one, two = meet({}, {"strategy_options": {"level": 3}})
    assert one == two
    assert 'strategy options: rank 0 (node 0) has none; rank 1 (node 0) has {"level": 3}' in one
    assert Meeting.connected == []
