"""A training that is killed at any moment, and started again, ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outside import outside_of_jobs

PROGRAMS = Path(__file__).parent / "programs"
CRASHES = int(os.environ.get("FABRIC_CRASHES", "20"))
SHARES = {"ddp": 0.4, "fsdp": 0.35, "deepspeed_stage_2": 0.25}
OTHER_DISK = Path("/dev/shm")
AS_ROOT = ("unshare", "--mount", "--map-root-user")

pytestmark = pytest.mark.timeout(120 + 20 * CRASHES)

Report = dict[str, Any]


def can_mount() -> bool:
    """Whether this machine lets us mount something in a namespace of our own."""
    command = [*AS_ROOT, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    """What became of the training of a strategy. Its temporary directory is on another file system."""
    found: dict[str, Report] = {}
    environ = outside_of_jobs("DS_")
    if OTHER_DISK.is_dir():
        environ["TMPDIR"] = str(OTHER_DISK)

    def report(strategy: str) -> Report:
        if strategy not in found:
            config = {
                "strategy": strategy,
                "folder": str(tmp_path_factory.mktemp(strategy)),
                "seed": len(strategy),
                "crashes": max(1, round(CRASHES * SHARES[strategy])),
                "sweep": False,
                "faults": 2,
                "disk": can_mount(),
            }
            server = [sys.executable, str(PROGRAMS / "server.py"), json.dumps(config)]
            done = subprocess.run(
                [*(AS_ROOT if config["disk"] else ()), *server],
                env={**environ, "FABRIC_GRACE_SECONDS": "2", "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=100 + 20 * CRASHES,
            )
            assert done.returncode == 0, done.stderr
            found[strategy] = {
                **config,
                **json.loads(done.stdout.splitlines()[-1]),
                "asked": config["crashes"],
            }
        return found[strategy]

    return report


@pytest.fixture(params=SHARES)
def report(request: pytest.FixtureRequest, reports: Callable[[str], Report]) -> Report:
    """That of each strategy, whose attempts all went as they should."""
    found = reports(request.param)
    assert found["failures"] == []
    assert found["crashes"] == found["asked"]
    return found


def test_a_killed_training_ends_with_the_very_same_numbers(report: Report) -> None:
    assert report["trainings"] >= 1
    assert report["differ"] == []


def test_no_checkpoint_is_torn_and_none_that_was_saved_is_lost(report: Report) -> None:
    assert report["complaints"] == []


def test_somebody_is_killed_in_the_middle_of_saves(report: Report) -> None:
    assert report["phases"].get("save", 0) + report["phases"].get("rotation", 0) >= report["crashes"] // 3


def test_a_disk_that_fails_is_one_clear_error_and_costs_nothing_that_was_there(report: Report) -> None:
    assert report["faults"] == 2
    assert len(report["errors"]) >= (2 if report["disk"] else 0)


def test_a_full_disk_and_one_that_cannot_be_written_to_are_told_apart(report: Report) -> None:
    if not report["disk"]:
        pytest.skip("not run: this machine lets nobody mount a disk (unshare --mount --map-root-user)")
    assert "No space left on device" in report["errors"][-2]
    assert "Read-only file system" in report["errors"][-1]
