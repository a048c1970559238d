"""What collectives and data-parallel steps cost on two real ranks: calls of functions, and what the group is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("programs") / "two_ranks.py"
VERBS = ("all_reduce", "all_gather", "broadcast of an object", "barrier")
STEPS = ("DDP step", "DDP window of 4")
OURS = ("FABRIC_", "MASTER_", "RANK", "LOCAL_", "WORLD_", "NODE_", "GROUP_", "TORCHELASTIC_")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    command = [sys.executable, "-m", "fabric_core", "run", str(PROGRAM), "--strategy=ddp", "--devices=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environ)
    assert done.returncode == 0, done.stderr
    counted: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return counted


@pytest.mark.parametrize("name", [*VERBS, *STEPS])
def test_it_calls_no_more_functions_than_before(held: Any, found: dict[str, Any], name: str) -> None:
    held("calls-over-plain", name, found[name]["calls over plain"])


@pytest.mark.parametrize("name", [*VERBS, *STEPS])
def test_it_asks_no_more_of_the_group_than_before(held: Any, found: dict[str, Any], name: str) -> None:
    held("collectives", name, sum(found[name]["operations"].values()))


@pytest.mark.parametrize("name", VERBS)
def test_no_barrier_hides_in_a_collective(found: dict[str, Any], name: str) -> None:
    operators = {"all_gather": "_allgather_base_", "broadcast of an object": "broadcast_"}
    assert set(found[name]["operations"]) == {f"c10d::{operators.get(name, 'allreduce_')}"}
