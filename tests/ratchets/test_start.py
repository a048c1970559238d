"""What a start costs, in modules, files and megabytes, beside a plain PyTorch loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("programs") / "start.py"
PHASES = {
    "import fabric_core": "fabric_core",
    "from fabric_core import Fabric": "Fabric",
    "the first Fabric()": "Fabric()",
    "the second Fabric()": "Fabric() again",
    "three steps": "training",
}
LOOKS = ("stats", "folders listed", "modules' files opened", "other files opened")
"""Calls of the file system, but for the metadata of distributions, whose number depends on what else is installed."""

HELP = """
import sys
before = len(sys.modules)
sys.argv = ["fabric", "--help"]
from fabric_core.cli import main
try:
    main()
except SystemExit:
    print(len(sys.modules) - before, "torch" in sys.modules, file=sys.stderr)
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter, twice, because the first one may write bytecode."""
    ours = ("FABRIC_", "PYTHON", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=200, env=environ, cwd="/"
        )
        assert ended.returncode == 0, ended.stderr
    return ended


@pytest.fixture(scope="module")
def ours() -> Any:
    return json.loads(python(str(PROGRAM), "fabric").stdout)


@pytest.fixture(scope="module")
def plain() -> Any:
    return json.loads(python(str(PROGRAM), "plain").stdout)


@pytest.mark.parametrize("phase", PHASES)
def test_no_phase_of_a_start_imports_more_modules(ours: Any, held: Any, phase: str) -> None:
    held("modules", phase, ours["phases"][PHASES[phase]]["modules"], slack=2)


@pytest.mark.parametrize("phase", PHASES)
def test_no_phase_of_a_start_looks_at_more_files(ours: Any, held: Any, phase: str) -> None:
    counts = ours["phases"][PHASES[phase]]
    held("file-system-calls", phase, sum(counts.get(what, 0) for what in LOOKS), slack=25)


def test_a_further_fabric_calls_no_more_functions(ours: Any, held: Any) -> None:
    held("calls", "the second Fabric()", ours["phases"]["Fabric() again"]["calls"], slack=30)


def test_what_is_installed_is_searched_once_and_each_list_of_entry_points_opened_once(ours: Any) -> None:
    opened = {phase: counts.get("metadata files opened", 0) for phase, counts in ours["phases"].items()}
    # The second file is that of our five distributions, and of other plugins.
    assert 0 < opened.pop("Fabric()") <= ours["installed"] + 10
    assert [phase for phase in PHASES.values() if opened.get(phase)] == []


def test_a_training_of_ours_looks_at_fewer_files_than_a_plain_one(ours: Any, plain: Any) -> None:
    for what in (*LOOKS[:3], "modules"):
        mine, theirs = (
            sum(counts.get(what, 0) for counts in run["phases"].values()) for run in (ours, plain)
        )
        assert mine < 0.8 * theirs, what


def test_a_training_of_ours_takes_less_memory_than_a_plain_one(ours: Any, plain: Any, held: Any) -> None:
    held("megabytes", "peak of three steps over plain", ours["peak"] - plain["peak"], slack=15)


def test_the_help_of_the_command_imports_no_more_modules(held: Any) -> None:
    modules, torch = python("-c", HELP).stderr.split()
    assert torch == "False"
    held("modules", "fabric --help", int(modules), slack=2)
