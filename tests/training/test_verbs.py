"""The verbs between two processes, started in each of the ways that there are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import verbs

PROGRAM = Path(verbs.__file__)


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, fabric_run: Callable[..., Any]
) -> list[dict[str, str]]:
    """What became of each check, on each rank."""
    folder = tmp_path_factory.mktemp("verbs")
    done = fabric_run("verbs", "--devices=2", folder)
    assert done.stdout.count("only one of us says this") == 1
    return read(folder)


def read(folder: Path) -> list[dict[str, str]]:
    return [json.loads((folder / f"outcome-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", verbs.CHECKS)
def test_verb(name: str, outcomes: list[dict[str, str]]) -> None:
    for outcome in outcomes:
        assert outcome[name] == "ok", outcome[name]


def test_torchrun_may_start_the_same_program(tmp_path: Path, clean_environ: dict[str, str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(PROGRAM), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=110,
        env=clean_environ,
    )
    assert done.returncode == 0, done.stderr
    assert [set(outcome.values()) for outcome in read(tmp_path)] == [{"ok"}, {"ok"}]
