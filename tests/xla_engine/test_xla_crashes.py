"""A training on two XLA devices that is killed, most often inside of a save, ends as if nothing had happened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FOLDERS = (
    HERE / "two_chips",
    HERE / "programs",
    HERE.parent / "crashes" / "programs",
)
CRASHES = int(os.environ.get("FABRIC_CRASHES", "20")) // 4

pytestmark = pytest.mark.timeout(200 + 40 * CRASHES)


def test_a_killed_training_ends_with_the_very_same_numbers(
    xla_program: Callable[..., Any], tmp_path: Path
) -> None:
    config = {"strategy": "xla_fsdp", "folder": str(tmp_path), "seed": 3, "crashes": CRASHES}
    config |= {"sweep": False, "faults": 1, "disk": False}
    done = xla_program(
        HERE / "programs" / "crashing.py",
        json.dumps(config),
        devices=2,
        timeout=180 + 40 * CRASHES,
        PYTHONPATH=os.pathsep.join(map(str, FOLDERS)),
        FABRIC_GRACE_SECONDS="2",
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failures"] == []
    assert (report["crashes"], report["faults"]) == (CRASHES, 1)
    assert report["trainings"] >= 1
    assert report["differ"] == [], "bit for bit: parameters, optimizer, samples, losses"
    assert report["complaints"] == [], "no checkpoint is torn, and none that was saved is lost"
    assert report["phases"].get("save", 0) + report["phases"].get("rotation", 0) >= CRASHES // 3
    assert len(report["errors"]) == 1, "a disk that fails is one clear error"
