"""Tests that lack their engine are counted, at the end of every run of the tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.engine
def test_one():
    pass

@pytest.mark.engine
@pytest.mark.parametrize("n", [1, 2])
def test_two(n):
    pytest.skip("not run: there is no engine (install it)")

@pytest.fixture
def other():
    pytest.skip("not run: another is missing")

def test_three(other):
    pass

def test_four():
    pytest.skip("for a reason of its own")
"""


@pytest.mark.parametrize(
    ("choice", "printed"),
    [
        (
            "test_",
            "3 engine test(s) not run, 1 run\n  2: there is no engine (install it)\n  1: another is missing\n",
        ),
        ("test_one", "0 engine test(s) not run, 1 run\n"),
        ("test_four", ""),
    ],
)
def test_tests_without_their_engine_are_counted(
    choice: str, printed: str, root: Path, tmp_path: Path
) -> None:
    shutil.copy(root / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = engine\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", choice]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert printed in done.stdout
    assert ("engine test(s)" in done.stdout) == bool(printed)
