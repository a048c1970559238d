"""Runs on several ranks that were interrupted and go on, on as many ranks or on others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fabric_core import Fabric

TRAINING = (Path(__file__).parent / "programs" / "noisy_training.py").read_text(encoding="utf-8")
NAMES: dict[str, Any] = {}
exec(TRAINING, NAMES)
CALM = {"dropout": 0.0, "num_workers": 2}
"""A model that draws no random numbers, and samples whose noise follows from their number alone."""

ON_TWO = (
    TRAINING
    + """
scaled = {"precision": "16-mixed", "precision_options": {"scaler": {"init_scale": 64.0, "growth_interval": 3}}}
with Fabric(accelerator="cpu", devices=world, strategy=STRATEGY) as fabric:
    fabric.launch()
    found = {workers: rests(fabric, f"noisy-{workers}", num_workers=workers)[1] for workers in (0, 2)}
    begun = train(fabric, "two", keep=(2, 4), **CALM)
    more = {point: train(fabric, f"more-{point}", f"{ALONE}/{point}", epochs=1, **CALM) for point in (2, 4)}
with Fabric(accelerator="cpu", devices=world, strategy=STRATEGY, **scaled) as fabric:
    whole, found["scaled"] = rests(fabric, "scaled", (2, 4))
found["scale"] = whole["end"]["__fabric__"]["precision"]["scale"]
answer({**found, "begun": begun, "more": more})
"""
)
ON_FOUR = (
    TRAINING
    + """
with Fabric(accelerator="cpu", devices=world, strategy="ddp") as fabric:
    fabric.launch()
    rest = {point: train(fabric, f"four-{point}", f"{TWO}/{point}", **CALM) for point in (2, 4)}
    begun = train(fabric, "four", keep=(6,), **CALM)
answer({"rest": rest, "begun": begun})
"""
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The checkpoints of a training on one rank, and what it gave."""
    folder = tmp_path_factory.mktemp("alone")
    with Fabric(accelerator="cpu") as fabric:
        return folder, NAMES["train"](fabric, folder, keep=(2, 4), **CALM)


@pytest.fixture(scope="module")
def on_two(shared_programs: Any, alone: tuple[Path, Any]) -> Callable[[str], Any]:
    """What both of two ranks found under a strategy. Their checkpoints are in the folder ``two``."""

    @functools.cache
    def answers(strategy: str) -> Any:
        names = f"STRATEGY, ALONE, CALM = {strategy!r}, {str(alone[0])!r}, {CALM}\n"
        return shared_programs.answers_of(names + ON_TWO, timeout=300)

    return answers


def seen_by(*ranks: dict[str, Any]) -> list[Any]:
    """The samples that were seen, each with its noise, in the order of the whole."""
    samples: list[Any] = NAMES["in_order"]([each["seen"] for each in ranks])
    return samples


def like(losses: list[float]) -> Any:
    """Equal but for the order in which gradients are added up."""
    return pytest.approx(losses, rel=1e-4)


both = pytest.mark.parametrize("strategy", ["ddp", "fsdp"])


@both
def test_two_ranks_go_on_as_if_nothing_had_happened(strategy: str, on_two: Any) -> None:
    for answer in on_two(strategy):
        assert answer[0] == [(True, 6, 24), (True, 4, 16), (True, 3, 12)]
        assert answer[2] == [(True, 6, 0), (True, 4, 0), (True, 3, 0)]


@both
def test_the_scale_of_losses_goes_on_growing(strategy: str, on_two: Any) -> None:
    for answer in on_two(strategy):
        assert [(same, steps) for same, steps, _ in answer["scaled"]] == [(True, 6), (True, 4)]
        assert answer["scale"] == 64.0 * 2**2  # after 3 and 6 of 8 steps


@both
def test_two_ranks_go_on_with_what_one_began(strategy: str, on_two: Any, alone: tuple[Path, Any]) -> None:
    answers = on_two(strategy)
    middle, end = ([answer["more"][point] for answer in answers] for point in (2, 4))
    assert seen_by(*middle) == seen_by(alone[1])[16:32]
    assert middle[0]["losses"] == like(alone[1]["losses"][2:4])
    assert seen_by(*end) == []  # the epoch is over, but for what comes after its loop


@both
def test_one_rank_goes_on_with_what_two_began(
    strategy: str, on_two: Any, shared_programs: Any, tmp_path: Path
) -> None:
    begun = [answer["begun"] for answer in on_two(strategy)]
    seen = seen_by(*begun)
    assert sorted(sample[0] for sample in seen[:32]) == [index / 32 for index in range(32)]
    with Fabric(accelerator="cpu", devices=1, strategy=strategy) as fabric:
        for point in (2, 4):
            there = shared_programs.folder / "two" / str(point)
            rest = NAMES["train"](fabric, tmp_path, there, seed=60, **CALM)
            assert seen_by(rest) == seen[8 * point :]
            assert rest["losses"] == like(begun[0]["losses"][point:])


def test_four_ranks_go_on_with_what_two_began_and_one_with_what_four_began(
    on_two: Any, shared_programs: Any, tmp_path: Path
) -> None:
    two = [answer["begun"] for answer in on_two("fsdp")]
    names = f"TWO, CALM = 'two', { {**CALM, 'num_workers': 1} }\n"
    answers = shared_programs.answers_of(names + ON_FOUR, num_processes=4, timeout=300)
    for point in (2, 4):
        rest = [answer["rest"][point] for answer in answers]
        assert seen_by(*rest) == seen_by(*two)[8 * point :]
        assert rest[0]["losses"] == like(two[0]["losses"][point:])
    four = [answer["begun"] for answer in answers]
    with Fabric(accelerator="cpu") as fabric:
        rest = NAMES["train"](fabric, tmp_path, shared_programs.folder / "four" / "6", seed=60, **CALM)
    assert seen_by(rest) == seen_by(*four)[48:]
    assert rest["losses"] == like(four[0]["losses"][6:])
