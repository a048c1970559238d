"""What the parent of a job imports that it starts and watches: no PyTorch, and little else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RUN = """
import json, sys
before = set(sys.modules)
from fabric_core.cli import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit as end:
    assert not end.code, end.code
imported = sorted(set(sys.modules) - before)
print(json.dumps(imported))
"""
HEAVY = {"torch", "numpy", "rich", "jinja2", "multiprocessing", "asyncio", "concurrent.futures"}


@pytest.mark.parametrize("start", ["fresh", "warm"])
def test_the_parent_of_a_job_imports_no_more_than_it_did(
    start: str, tmp_path: Path, held: Callable[..., None]
) -> None:
    (tmp_path / "train.py").touch()
    words = ["run", "train.py", "--devices=2", "--accelerator=cpu", f"--start={start}"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FABRIC_")}
    ended = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(words)],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    imported = json.loads(ended.stdout)
    assert not HEAVY & set(imported)
    held("modules", f"parent of a job, {start}", len(imported), slack=2)
