"""Tests that need torch_xla, and so a PyTorch of its version: ``make test-xla`` runs them in their own environment.

XLA's devices are the CPU here (``PJRT_DEVICE=CPU``). Whether there are one or four, and whether a process is in SPMD
mode, is decided once in a process; so one device is used in this one, and programs are started for the rest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PROGRAMS = HERE.parent / "training" / "programs"

try:
    version("torch_xla")
except PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ["PJRT_DEVICE"] = "CPU"
    os.environ.pop("CPU_NUM_DEVICES", None)
    # What is compiled here runs a few times on a few numbers: to optimize it takes longer than it saves.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture(scope="session", autouse=True)
def _device() -> None:
    """Look at the device before any plain loop here runs a backward pass: PyTorch counts devices at the first one."""
    import torch_xla

    assert torch_xla.device_count() == 1


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def xla_program() -> Run:
    """Run a program on some XLA devices of the CPU; warnings of Python are errors in it."""

    def run(
        *arguments: object, devices: int = 1, timeout: float = 300, ok: bool = True, **variables: str
    ) -> Any:
        done = subprocess.run(
            [sys.executable, "-W", "error", *map(str, arguments)],
            env={
                **os.environ,
                "CPU_NUM_DEVICES": str(devices),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(PROGRAMS),
                **variables,
            },
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if ok:
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def answers(xla_program: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What one of the programs beside this file found out, by name of the check."""

    def ask(name: str, devices: int = 1) -> Any:
        folder = tmp_path_factory.mktemp(name)
        xla_program(HERE / "programs" / f"{name}.py", folder, devices=devices)
        return json.loads((folder / "answers.json").read_text())

    return ask
