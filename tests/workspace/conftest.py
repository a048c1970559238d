"""What the tests of the workspace share: where it is, and what each distribution says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NOT_OURS = ("build", "dist", "__pycache__")
HIDDEN_AND_OURS = (".ci", ".github")
DISTRIBUTIONS = ("fabric_core", "fabric_backends", "fabric_cuda", "fabric_xla", "fabric_deepspeed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``distribution`` runs once for each of the five, by its import name."""
    if "distribution" in metafunc.fixturenames:
        metafunc.parametrize("distribution", DISTRIBUTIONS)


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the workspace."""
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def settings(root: Path) -> dict[str, Any]:
    """The workspace's pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def manifests(root: Path) -> dict[str, dict[str, Any]]:
    """Each distribution's pyproject.toml, by import name."""
    return {
        name: tomllib.loads((root / name / "pyproject.toml").read_text(encoding="utf-8"))
        for name in DISTRIBUTIONS
    }


@pytest.fixture(scope="session")
def files(root: Path) -> list[Path]:
    """Every file that belongs to the repository, also where there is no git to ask."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.CalledProcessError):
        return walk(root)
    return [path for name in listed.decode().split("\0") if name and (path := root / name).is_file()]


def walk(folder: Path) -> list[Path]:
    """The files below a folder, without environments, caches and build results."""
    found: list[Path] = []
    for name, folders, names in os.walk(folder):
        folders[:] = [
            f for f in folders if f in (".ci", ".github") or not (f in NOT_OURS or f.startswith("."))
        ]
        found += [Path(name, file) for file in names]
    return found
