"""What the tests on real engines share: one training, what the ranks of an engine made of it, and when to skip."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import one_training
import pytest
import torch
from outside import outside_of_jobs

PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Job:
    """One training on an engine.

    Attributes:
        folder: Where its ranks write.
    """

    folder: Path

    def command(self, *arguments: object) -> list[str]:
        """What a rank runs."""
        return [sys.executable, str(PROGRAMS / "one_training.py"), str(self.folder), *map(str, arguments)]

    def ranks(self) -> list[dict[str, Any]]:
        """What the ranks that finished say of themselves, in their order."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("rank-*.json"))]

    def check(self, environment: str, ranks: list[list[int]]) -> None:
        """The numbers are those of the plain loop; every rank found its place, and all met at one."""
        found = self.ranks()
        assert [facts["ranks"] for facts in found] == ranks
        assert {facts["environment"] for facts in found} == {environment}
        assert {facts["strategy"] for facts in found} == {"ddp"}
        assert len({str((facts["place"], facts["size"], facts["began"])) for facts in found}) == 1
        result, plain = torch.load(self.folder / "result.pt"), one_training.train_plain()
        start = one_training.make()[0].state_dict()
        assert max(float((plain[name] - start[name]).abs().max()) for name in plain) > 0.01
        assert max(float((plain[name] - result[name]).abs().max()) for name in plain) < 1e-6


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.fixture
def jobs(tmp_path: Path) -> Callable[[str], Job]:
    """Jobs by name, each with a folder of its own."""

    def make(name: str) -> Job:
        (tmp_path / name).mkdir()
        return Job(tmp_path / name)

    return make


@pytest.fixture
def ray_environ(clean_environ: dict[str, str]) -> dict[str, str]:
    """The variables for a Ray that writes no token, asks nobody, and reports nothing."""
    try:
        importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not run: Ray is not installed (pip install ray)")
    return {**clean_environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="session")
def clean_environ() -> dict[str, str]:
    """The environment variables, without any that say something about a job; one thread per process."""
    kept = outside_of_jobs("SLURM_", "PMI", "OMPI")
    return {**kept, "OMP_NUM_THREADS": "1"}
