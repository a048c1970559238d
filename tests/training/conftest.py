"""Running the programs of this folder as jobs of several processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from outside import outside_of_jobs

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture(scope="session")
def clean_environ() -> dict[str, str]:
    """The environment variables, without any that say something about a job."""
    return outside_of_jobs()


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
