"""One number from which every random stream follows."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fabric_core.data import seed as seeds
from fabric_core.data.seed import (
    current_seed,
    seed_environment,
    seed_everything,
    seed_worker,
    seeded_rng,
    worker_seed,
    workers_are_seeded,
)
from fabric_core.errors import ConfigurationError, WrongTypeError


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(seeds, "_state", seeds._State())
    monkeypatch.delenv("FABRIC_SEED", raising=False)
    monkeypatch.delenv("FABRIC_SEED_WORKERS", raising=False)
    with seeded_rng(0):
        yield


def draw() -> tuple[Any, ...]:
    return random.random(), float(np.random.rand()), torch.rand(3).tolist()


def test_generators_that_torch_does_not_know_are_seeded_too() -> None:
    seen: list[int] = []
    seeds.seed_also("elsewhere", seen.append)
    assert seen == [], "the run has no seed"
    seed_everything(3)
    assert seen == [3]
    late: list[int] = []
    seeds.seed_also("elsewhere", late.append)
    assert late == [3], "the run has one by now"
    seed_everything(4)
    assert (seen, late) == ([3], [3, 4]), "the later call has taken the place of the first"


def test_python_numpy_and_torch_are_seeded_as_each_documents_it() -> None:
    assert seed_everything(42) == 42
    drawn = draw()
    random.seed(42)
    np.random.seed(42)
    torch.manual_seed(42)
    assert drawn == draw()


def test_the_same_seed_gives_the_same_streams_and_another_gives_others() -> None:
    seed_everything(1)
    first = draw()
    seed_everything(1)
    assert draw() == first
    seed_everything(2)
    assert draw() != first


def test_without_a_seed_the_last_one_counts_then_the_environment_then_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert current_seed() is None
    monkeypatch.setenv("FABRIC_SEED", "7")
    assert current_seed() == 7
    assert seed_everything() == 7
    seed_everything(9)
    assert seed_everything() == current_seed() == 9
    monkeypatch.setattr(seeds, "_state", seeds._State())
    monkeypatch.delenv("FABRIC_SEED")
    assert seed_everything() == 0


def test_nothing_is_written_into_the_environment() -> None:
    before = dict(os.environ)
    seed_everything(5)
    seed_environment()
    assert dict(os.environ) == before


@pytest.mark.parametrize("bad", [-1, 2**32, 10**20])
def test_a_seed_out_of_range_is_refused_with_the_range(bad: int) -> None:
    with pytest.raises(ConfigurationError, match=f"given {bad}.*0 to 4294967295"):
        seed_everything(bad)
    assert current_seed() is None


@pytest.mark.parametrize("bad", [True, "42", 1.0, [1], torch.tensor(1.5)])
def test_a_seed_that_is_no_integer_is_refused_with_its_type(bad: Any) -> None:
    with pytest.raises(WrongTypeError, match=type(bad).__name__):
        seed_everything(bad)


@pytest.mark.parametrize("good", [0, 2**32 - 1, np.int64(5), np.uint8(5)])
def test_the_bounds_and_numpy_integers_are_seeds(good: Any) -> None:
    value = seed_everything(good)
    assert value == good
    assert type(value) is int


@pytest.mark.parametrize("bad", ["x", "-1", "1.5", str(2**32), " "])
def test_a_malformed_variable_is_named(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABRIC_SEED", bad)
    with pytest.raises(ConfigurationError, match="FABRIC_SEED"):
        seed_everything()
    assert seed_everything(3) == 3  # an explicit seed does not look at it
    assert current_seed() == 3


def test_the_choice_of_workers_is_kept_and_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not workers_are_seeded()
    assert seed_environment() == {}
    seed_everything(5, workers=False)
    assert not workers_are_seeded()
    passed = seed_environment()
    assert passed == {"FABRIC_SEED": "5", "FABRIC_SEED_WORKERS": "0"}
    seed_everything(5)
    assert workers_are_seeded()
    monkeypatch.setattr(seeds, "_state", seeds._State())
    for name, value in passed.items():
        monkeypatch.setenv(name, value)
    assert current_seed() == 5
    assert not workers_are_seeded()
    assert seed_environment() == passed
    monkeypatch.setenv("FABRIC_SEED_WORKERS", "1")
    assert workers_are_seeded()


def test_it_says_which_seed_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    seed_everything(11)
    assert capsys.readouterr() == ("", "")
    seed_everything(11, verbose=True)
    assert "11" in capsys.readouterr().err


def test_importing_the_module_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; import fabric_core.data.seed as s; s.seed_environment(); s.worker_seed(1, 2, 3)\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_worker_seeds_do_not_collide_and_use_all_their_bits() -> None:
    grid = list(itertools.product([0, 1, 42, 2**32 - 1], range(16), range(32), range(8)))
    values = [worker_seed(base, worker, rank, epoch) for base, worker, rank, epoch in grid]
    assert len(set(values)) == len(grid)
    assert worker_seed(1, 2, 3) == worker_seed(1, 2, 3)
    assert len({worker_seed(*order) for order in itertools.permutations((1, 2, 3))}) == 6
    assert worker_seed(1, 12, 3) != worker_seed(11, 2, 3)
    for bit in range(64):
        share = sum(value >> bit & 1 for value in values) / len(values)
        assert 0.47 < share < 0.53
    assert all(0 <= value < 2**64 for value in values)


def test_a_worker_takes_a_seed_of_64_bits() -> None:
    seed_worker(2**64 - 1)
    first = draw()
    seed_worker(2**64 - 2)
    assert all(a != b for a, b in zip(first, draw(), strict=True))
    seed_worker(2**63 - 1)  # of which PyTorch's CPU generator sees the lower half only
    assert all(a != b for a, b in zip(first[:2], draw()[:2], strict=True))
    seed_worker(2**64 - 1)
    assert draw() == first


def test_a_context_has_streams_of_its_own_and_leaves_the_others_alone() -> None:
    seed_everything(3)
    expected = [draw(), draw()]
    seed_everything(3)
    assert draw() == expected[0]
    with seeded_rng(8):
        inside = draw()
    with pytest.raises(KeyError), seeded_rng(8):
        {}[str(draw())]
    assert draw() == expected[1]
    with seeded_rng(8):
        assert draw() == inside


def test_a_context_that_is_entered_again_goes_on() -> None:
    with seeded_rng(8):
        expected = [draw(), draw()]
    streams = seeded_rng(8)
    with streams:
        first = draw()
    draw()
    with streams:
        assert [first, draw()] == expected


def test_every_device_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", touched.append)  # which sees to all devices
    seed_everything(6)
    assert touched == [6]


def test_the_streams_of_the_devices_are_not_touched_by_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", touched.append)
    with seeded_rng(1):
        pass
    assert touched == []
