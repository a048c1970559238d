"""Running the programs of this folder as jobs of several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
OURS = ("FABRIC_", "MASTER_", "RANK", "LOCAL_", "WORLD_", "NODE_", "GROUP_", "TORCHELASTIC_")


@pytest.fixture(scope="session")
def clean_environ() -> dict[str, str]:
    """The environment variables, without any that say something about a job."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS)}


@pytest.fixture(scope="session")
def fabric_run(clean_environ: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call ``fabric run`` on a program, by name or path, and wait for it; it must succeed, unless told otherwise."""

    def run(
        program: str | Path,
        *arguments: object,
        check: bool = True,
        timeout: float = 110,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        path = program if isinstance(program, Path) else PROGRAMS / f"{program}.py"
        done = subprocess.run(
            [sys.executable, "-m", "fabric_core", "run", str(path), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**clean_environ, **variables},
        )
        if check:
            assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
