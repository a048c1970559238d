"""Training in ranks that ``fabric run`` has started, again when one of them was killed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any


def test_restarted_ranks_go_on_from_the_checkpoint_as_if_none_had_been_killed(
    job: Any, clean_environ: dict[str, str]
) -> None:
    options = ("--devices=2", "--max-restarts=1")
    done = subprocess.run(
        [sys.executable, "-m", "fabric_core", "run", *options, *job.command("--crash-at", 5)[1:]],
        capture_output=True,
        text=True,
        timeout=120,
        env=clean_environ,
    )
    assert done.returncode == 0, done.stderr
    assert "killed by SIGKILL" in done.stderr
    assert "fabric: all ranks are started again: restart 1 of 1" in done.stderr
    job.check("local", ranks=[[0, 0, 0], [1, 1, 0]])
    assert [(facts["began"], facts["restarts"]) for facts in job.ranks()] == [(5, 1)] * 2
