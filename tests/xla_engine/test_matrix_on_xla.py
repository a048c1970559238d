"""Every XLA strategy with every precision that it claims gives the numbers of a plain PyTorch loop."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matrix
import pytest
import torch
from matrix import Cell, Outcome

from fabric_xla.hooks import STRATEGIES

PAGE = Path(__file__).parents[2] / "docs" / "xla.md"
TABLE = re.compile(r"(?<=<!-- written by the tests -->\n\n).*?(?=\n\n<!-- until here -->)", re.DOTALL)

ONE, FOUR = 1, 4
CELLS = {
    devices: [
        Cell(spec.name, precision)
        for spec in STRATEGIES
        if (spec.processes == "single") == (devices == FOUR)
        for precision in spec.precisions
    ]
    for devices in (ONE, FOUR)
}
ROWS = [(devices, cell) for devices, cells in CELLS.items() for cell in cells]


@pytest.fixture(scope="module")
def outcomes(
    xla_program: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[Cell, Outcome]]:
    """What came out of all cells, by the number of devices."""
    found = {}
    for devices, cells in CELLS.items():
        folder = tmp_path_factory.mktemp(f"devices-{devices}")
        asked, answer = folder / "cells.json", folder / "results.pt"
        asked.write_text(json.dumps([asdict(cell) for cell in cells]))
        xla_program(matrix.__file__, asked, answer, "tpu", devices=devices)
        loaded = torch.load(answer, weights_only=False)
        found[devices] = {Cell(*names): Outcome(**fields) for names, fields in loaded.items()}
    return found


def last_digit(cell: Cell, outcome: Outcome, name: str) -> float:
    """How far apart two neighbouring weights are, where weights have 16 bits.

    XLA rounds less often than PyTorch, so that a weight may end as the neighbour of what it is in the plain loop.
    """
    if not cell.precision.endswith("-true") or cell.precision == "32-true":
        return 0.0
    largest = max(value.abs().max() for value in outcome.trained[name].parameters.values())
    following = torch.nextafter(largest, torch.tensor(torch.inf, dtype=largest.dtype))
    return float(following.double() - largest.double())


def judge(cell: Cell, name: str, outcome: Outcome) -> tuple[float, float]:
    found, allowed = matrix.judge(cell, name, outcome)
    return found, max(allowed, 1.01 * last_digit(cell, outcome, name))


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("devices", "cell"), ROWS, ids=[f"{cell.strategy}-{cell.precision}-{devices}" for devices, cell in ROWS]
)
def test_a_cell_equals_the_plain_loop(
    devices: int, cell: Cell, outcomes: dict[int, dict[Cell, Outcome]]
) -> None:
    outcome = outcomes[devices][cell]
    assert not outcome.error, outcome.error
    assert set(outcome.trained) == {*cell.cases, "resumed"}
    for name in outcome.trained:
        found, allowed = judge(cell, name, outcome)
        assert found <= allowed, f"{name}: {found:.1e} is more than {allowed:.1e}"


@pytest.mark.timeout(400)
def test_the_table_in_the_documentation_is_what_was_found(
    outcomes: dict[int, dict[Cell, Outcome]],
) -> None:
    lines = ["| strategy | devices | precisions |", "|---|---|---|"]
    for devices, cells in CELLS.items():
        for strategy in dict.fromkeys(cell.strategy for cell in cells):
            equal = [
                f"`{cell.precision}`"
                for cell in cells
                if cell.strategy == strategy and is_equal(cell, outcomes[devices][cell])
            ]
            lines.append(f"| `{strategy}` | {devices} | {', '.join(equal)} |")
    page = PAGE.read_text(encoding="utf-8")
    written = TABLE.sub("\n".join(lines), page)
    if os.environ.get("FABRIC_WRITE_DOCS"):
        PAGE.write_text(written, encoding="utf-8")
        page = written
    assert page == written, "write it anew: FABRIC_WRITE_DOCS=1 make test-xla"


def is_equal(cell: Cell, outcome: Outcome) -> bool:
    judged = [judge(cell, name, outcome) for name in outcome.trained]
    return bool(judged) and all(found <= allowed for found, allowed in judged)
