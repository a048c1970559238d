"""One language model under every strategy: the same losses, the same text, a checkpoint that each of them can read."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "language_model.py"
SMALL = ("--steps=60", "--width=64", "--layers=2", "--context=64")
STRATEGIES = {
    "one process": ("--devices=1",),
    "ddp": ("--strategy=ddp", "--devices=2"),
    "fsdp": ("--strategy=fsdp", "--devices=2"),
    "tensor_parallel": ("--strategy=tensor_parallel", "--devices=2"),
}
NEARLY = 5e-4  # nats; what 60 steps make of the rounding of float32, and four printed digits


def run(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fabric_core", "run", str(EXAMPLE), *SMALL, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def losses(printed: str) -> list[float]:
    """Those of every twentieth step, and that of the test."""
    return [float(found) for found in re.findall(r"loss:? (\d+\.\d{4})", printed)]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the training printed under each strategy."""
    folder = tmp_path_factory.mktemp("language")
    return {
        name: run(*flags, f"--checkpoint={folder / name.replace(' ', '_')}")
        for name, flags in STRATEGIES.items()
    }


@pytest.mark.timeout(400)
def test_it_learns(printed: dict[str, str]) -> None:
    first, *_, last, on_test_set = losses(printed["one process"])
    assert first < math.log(128)  # what guessing costs
    assert last < first - 0.25
    assert on_test_set < 3.0


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "one process"])
def test_every_strategy_learns_the_same(printed: dict[str, str], strategy: str) -> None:
    expected, found = losses(printed["one process"]), losses(printed[strategy])
    assert len(found) == 4
    assert found == pytest.approx(expected, abs=NEARLY)


def test_it_writes_text_that_begins_as_it_was_told(printed: dict[str, str]) -> None:
    for text in printed.values():
        written = text.partition("test loss")[2].partition("\n")[2]
        assert written.startswith("The statement ")
        assert len(written.rstrip("\n")) >= 100
        assert text.count("The statement ") == 1


def test_what_one_strategy_has_begun_another_goes_on_with(tmp_path: Path, printed: dict[str, str]) -> None:
    checkpoint = f"--checkpoint={tmp_path / 'begun'}"
    run(*STRATEGIES["fsdp"], checkpoint, "--steps=20")
    resumed = run(*STRATEGIES["tensor_parallel"], checkpoint, "--resume")
    assert "going on after step 20" in resumed
    assert losses(resumed) == pytest.approx(losses(printed["one process"])[1:], abs=NEARLY)
