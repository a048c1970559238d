"""Training in workers of a real, local Ray."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

PROGRAM = Path(__file__).parent / "programs" / "ray_training.py"


def test_two_actors_of_ray_train_as_a_plain_loop_also_in_a_group_that_is_there_already(
    ray_environ: dict[str, str], jobs: Callable[[str], Any]
) -> None:
    own, given = jobs("own"), jobs("given")
    done = subprocess.run(
        [sys.executable, PROGRAM, own.folder, given.folder],
        env=ray_environ,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for job in (own, given):
        job.check("ray", ranks=[[0, 0, 0], [1, 1, 0]])
