"""Several models at once, each with a loader of its own, on real data, with the strategies that it names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "k_fold.py"
SHORT = ("--devices=2", "--epochs=2", "--folds=3")


def run(*arguments: object) -> str:
    command = [sys.executable, "-m", "fabric_core", "run", str(EXAMPLE), "--accelerator=cpu"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def numbers(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", printed)]


def test_five_models_read_the_digits_and_vote() -> None:
    *epochs, folds, together = run("--strategy=ddp", "--devices=2").splitlines()
    assert len(epochs) == 8
    assert folds.startswith("mean accuracy over 5 folds: ")
    assert numbers(folds)[0] >= 94.0
    assert together.startswith("accuracy of all models together on 360 other images: ")
    assert numbers(together)[0] >= 95.0
    last = numbers(epochs[-1])[::2]
    assert numbers(folds)[0] == pytest.approx(sum(last) / 5, abs=0.01)


@pytest.fixture(scope="module")
def by_ddp() -> str:
    return run("--strategy=ddp", *SHORT)


@pytest.mark.parametrize("strategy", ["ddp_sharded", "fsdp"])
def test_other_strategies_print_what_ddp_prints(strategy: str, by_ddp: str) -> None:
    found = run(f"--strategy={strategy}", *SHORT)
    assert numbers(found) == pytest.approx(numbers(by_ddp), abs=0.21)  # one image of 480 the other way


def test_one_process_does_it_too() -> None:
    assert run("--epochs=1", "--folds=2").count("%") == 4
