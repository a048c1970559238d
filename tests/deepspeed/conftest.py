"""Running the programs of this folder as jobs of one or several processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outside import outside_of_jobs

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture(scope="session")
def bare_environ() -> dict[str, str]:
    """The environment variables, without any that say something about a job or about DeepSpeed."""
    return outside_of_jobs("DS_", "TORCH_EXT")


@pytest.fixture(scope="session")
def jobs(
    tmp_path_factory: pytest.TempPathFactory, bare_environ: dict[str, str]
) -> Callable[[int], dict[str, Any]]:
    """What the checks found with so many processes. The job of two goes first: the one of one reads what it wrote."""
    folder = tmp_path_factory.mktemp("deepspeed")
    found: dict[int, dict[str, Any]] = {}

    def run(processes: int) -> dict[str, Any]:
        if processes not in found:
            if processes == 1:
                run(2)
            answer = folder / f"answer-{processes}.pt"
            done = subprocess.run(
                [
                    *(
                        sys.executable,
                        "-m",
                        "fabric_core",
                        "run",
                        f"--devices={processes}",
                        "--accelerator=cpu",
                    ),
                    *(str(PROGRAMS / "deepspeed_checks.py"), str(answer), str(folder / "shared")),
                ],
                env={**bare_environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=400,
            )
            assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            found[processes] = {**torch.load(answer, weights_only=False), "output": done.stdout + done.stderr}
        return found[processes]

    return run
