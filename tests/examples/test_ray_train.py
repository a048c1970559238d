"""The example for Ray, on a local one."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_train.py"


@pytest.mark.engine
def test_two_workers_of_ray_read_at_least_95_percent_of_the_digits() -> None:
    try:
        importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not run: Ray is not installed (pip install ray)")
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--workers=2"],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.search(r"test accuracy on 2 workers: (\d+\.\d+)%", done.stdout)
    assert match is not None, done.stdout
    assert float(match[1]) >= 95
    assert "epoch 1:" in done.stdout  # Ray hands lines on late, and may lose the last ones
