"""What a rank does to begin a job of many does not depend on how many there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fabric_backends import rendezvous

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale.py"
SIZES = (64, 4_096, 65_536)
STRAY = 20
"""Calls that are not ours: of a weak reference that dies meanwhile."""


def measured(*arguments: str) -> Any:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), "--json", "--sizes", *map(str, SIZES), *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("rank", ["first", "last"])
def test_the_cost_of_a_start_is_the_same_for_any_number_of_ranks(rank: str) -> None:
    phases = measured(*(("--rank", "0") if rank == "first" else ()))
    assert {"construct", "meet", "launch", "setup", "setup_dataloaders", "barrier", "agree"} < phases.keys()
    for phase, costs in phases.items():
        assert list(costs) == [str(size) for size in SIZES]
        calls = [cost["calls"] for cost in costs.values()]
        assert max(calls) - min(calls) <= STRAY, (phase, calls)
        operations = [cost["operations"] for cost in costs.values()]
        assert operations[0] == operations[1] == operations[2], phase
    # The plans are compared by three or four operations, and without a collective: the group is joined afterwards.
    assert sum(phases["launch"]["65536"]["operations"].values()) <= 5
    assert sum(phases["meet"]["65536"]["operations"].values()) <= 6


class Counting(dist.HashStore):
    """A store that counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def check(self, keys: list[str]) -> bool:
        self.asked["check"] += 1
        return bool(super().check(keys))

    def get(self, key: str) -> bytes:
        self.asked["get"] += 1
        return bytes(super().get(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.asked["multi_get"] += 1
        return list(super().multi_get(keys))

    def multi_set(self, keys: list[str], values: list[str]) -> None:
        self.asked["multi_set"] += 1
        super().multi_set(keys, values)


def test_rank_0_answers_all_that_have_come_at_once() -> None:
    store = Counting()
    for number in range(1, 1_001):
        store.set(f"fabric/come/{number}", f"token-{number}")
    left = rendezvous._answer(store, [f"fabric/come/{number}" for number in range(1, 1_001)], "fabric/here")
    assert left == []
    assert store.asked == {"check": 1, "multi_get": 1, "multi_set": 1}
    assert {store.get(f"fabric/answer/token-{number}") for number in (1, 500, 1_000)} == {b"fabric/here"}


def test_who_has_drawn_a_number_and_not_written_yet_is_answered_later() -> None:
    store = Counting()
    store.set("fabric/come/2", "two")
    left = rendezvous._answer(store, ["fabric/come/1", "fabric/come/2"], "fabric/here")
    assert left == ["fabric/come/1"]
    store.set("fabric/come/1", "one")
    assert rendezvous._answer(store, left, "fabric/here") == []
    assert store.get("fabric/answer/one") == store.get("fabric/answer/two") == b"fabric/here"


def test_a_store_that_can_only_do_one_thing_at_a_time_will_do() -> None:
    class Plain(Counting):
        def has_extended_api(self) -> bool:
            return False

    store = Plain()
    store.set("fabric/come/1", "one")
    assert rendezvous._answer(store, ["fabric/come/1"], "fabric/here") == []
    assert store.get("fabric/answer/one") == b"fabric/here"
    assert "multi_get" not in store.asked
