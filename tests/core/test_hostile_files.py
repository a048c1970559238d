"""Files that mean harm: nothing is executed, nothing else is opened, and no memory is filled."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"
NAMES = list(runpy.run_path(str(PROGRAMS / "hostile_files.py"))["FILES"])
ALLOWED_TO_GROW = 100 << 20  # bytes


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of loading each file, in one process for all."""
    command = [sys.executable, str(PROGRAMS / "hostile_loading.py"), str(tmp_path_factory.mktemp("hostile"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr  # also: no file has made the interpreter crash
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_the_corpus_is_large(loaded: dict[str, Any]) -> None:
    assert set(loaded) == set(NAMES)
    assert len(NAMES) >= 60


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_file_is_refused_and_does_nothing(loaded: dict[str, Any], name: str) -> None:
    found = loaded[name]
    assert found["error"] in ("CheckpointError", "UnsafeCheckpointError"), found["message"]
    assert name in found["message"], "the error does not name the file"
    assert found["opened"] == [], "something else was opened or started"
    assert found["left"] == [], "a file was made"
    assert not found["imported"]
    assert found["grown"] < ALLOWED_TO_GROW


def test_what_would_join_a_process_group_is_refused_before_it_is_made(loaded: dict[str, Any]) -> None:
    found = loaded["a_mesh_of_processes"]
    assert found["error"] == "UnsafeCheckpointError"
    assert "DeviceMesh" in found["message"]
