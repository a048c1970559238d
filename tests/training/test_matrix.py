"""Every strategy with every precision that it claims gives the numbers of a plain PyTorch loop."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matrix
import pytest
import torch
from matrix import Cell, Outcome

from fabric_core import Registry
from fabric_core.requirements import missing_requirements
from fabric_core.resolve.asked import overlap
from fabric_core.testing.plain_loop import train_plain

DOCUMENT = Path(__file__).parents[2] / "docs" / "matrix.md"
MESHES = ("fsdp", "fsdp_hybrid", "tensor_parallel", "ddp_sharded")
"""The strategies for which four processes are another matter than two."""

Key = tuple[str, int]


@functools.cache
def cells() -> dict[Key, list[Cell]]:
    """What to train, by the distribution that offers the strategy and the number of processes."""
    registry = Registry(environ={})
    (cpu,) = (offer.spec for offer in registry.offers("accelerator") if offer.spec.name == "cpu")
    unscoped = [
        o.spec for o in registry.offers("precision") if not (o.spec.strategies or o.spec.accelerators)
    ]
    found: dict[Key, list[Cell]] = {}
    for offer in registry.offers("strategy"):
        spec: Any = offer.spec
        if overlap(spec.rejects, cpu) or missing_requirements(spec):
            continue
        if not ("*" in spec.supports or overlap(spec.supports, cpu)):
            continue
        many = spec.processes == "per_device" and spec.max_devices is None
        for processes in (1, *((2,) if many else ()), *((4,) if spec.name in MESHES else ())):
            for precision in spec.precisions or [p.name for p in unscoped]:
                found.setdefault((offer.distribution, processes), []).append(Cell(spec.name, precision))
    return found


@functools.cache
def twins() -> dict[str, str]:
    """Of each strategy the first that is the same in a job of ``fabric run``: they differ in their launchers only."""
    first: dict[str, str] = {}
    known: dict[str, str] = {}
    for offer in Registry(environ={}).offers("strategy"):
        same = replace(offer.spec, name="same", description="", launcher=None, volunteers_for=(), priority=0)
        known[offer.spec.name] = first.setdefault(
            f"{same} {matrix.options_of(offer.spec.name, 2)}", offer.spec.name
        )
    return known


@pytest.fixture(scope="session")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, fabric_run: Callable[..., Any]
) -> Callable[[Key], dict[Cell, Outcome]]:
    """What came out of all cells of a distribution, trained by one job of so many processes."""

    @functools.cache
    def train(key: Key) -> dict[Cell, Outcome]:
        distribution, processes = key
        folder = tmp_path_factory.mktemp(f"{distribution}-{processes}")
        asked, answer = folder / "cells.json", folder / "results.pt"
        asked.write_text(json.dumps([asdict(cell) for cell in cells()[key] if cell == twin(cell)]))
        flags = (f"--devices={processes}", "--accelerator=cpu")
        fabric_run("matrix", *flags, asked, answer, timeout=600)
        loaded = torch.load(answer, weights_only=False)
        return {Cell(*names): Outcome(**fields) for names, fields in loaded.items()}

    return train


def twin(cell: Cell) -> Cell:
    """The cell that is trained in its place."""
    return replace(cell, strategy=twins()[cell.strategy])


ROWS = [(key, cell) for key, found in cells().items() for cell in found]
TRAINED = [(key, cell) for key, cell in ROWS if cell == twin(cell)]


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    ("key", "cell"), TRAINED, ids=[f"{cell.strategy}-{cell.precision}-{key[1]}" for key, cell in TRAINED]
)
def test_a_cell_equals_the_plain_loop(
    key: Key, cell: Cell, outcomes: Callable[[Key], dict[Cell, Outcome]]
) -> None:
    outcome = outcomes(key)[cell]
    assert not outcome.error, outcome.error
    assert set(outcome.trained) == {*cell.cases, "resumed"}
    for name in outcome.trained:
        found, allowed = matrix.judge(cell, name, outcome)
        assert found <= allowed, f"{name}: {found:.1e} is more than {allowed:.1e}"


@pytest.mark.timeout(700)
def test_the_table_in_the_documentation_is_what_was_found(
    outcomes: Callable[[Key], dict[Cell, Outcome]],
) -> None:
    equal: dict[Cell, list[int]] = {}
    for key, cell in ROWS:
        outcome = outcomes(key)[twin(cell)]
        judged = (
            [] if outcome.error else [matrix.judge(twin(cell), name, outcome) for name in outcome.trained]
        )
        if judged and all(found <= allowed for found, allowed in judged):
            equal.setdefault(cell, []).append(key[1])
    text = matrix.document(equal)
    if os.environ.get("FABRIC_WRITE_DOCS"):
        DOCUMENT.write_text(text, encoding="utf-8")
    assert DOCUMENT.read_text(encoding="utf-8") == text, "write it anew: make matrix"


def test_strategies_that_differ_in_their_launchers_are_trained_once() -> None:
    found = twins()
    assert {name for name, first in found.items() if first == "ddp"} == {
        "ddp",
        "ddp_spawn",
        "ddp_fork",
        "ddp_notebook",
    }
    assert found["ddp_find_unused_parameters_true"] == "ddp_find_unused_parameters_true"
    assert found["fsdp"] != found["fsdp_cpu_offload"]
    assert len(TRAINED) < len(ROWS)


def test_the_comparison_finds_a_training_that_differs() -> None:
    cell = Cell("made up", "32-true")
    case = cell.cases["plain"]
    assert matrix.judge(cell, "plain", Outcome({"plain": train_plain(case)}))[0] == 0.0
    unclipped = Outcome({"clip by norm": train_plain(case)})
    found, allowed = matrix.judge(cell, "clip by norm", unclipped)
    assert found > 100 * allowed
    half = Cell("made up", "bf16-mixed")
    wrong = Outcome({"everything": train_plain(half.cases["plain"])})
    wrong.trained["everything"].losses *= 3
    del wrong.trained["everything"].losses[-1]
    found, allowed = matrix.judge(half, "everything", wrong)
    assert found > 2 * allowed
