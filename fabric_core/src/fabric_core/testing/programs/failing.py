"""One rank raises an exception in the middle of a training, and the others wait for it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fabric_core.testing.plain_loop import CASES
from fabric_core.testing.programs.task import Task
from fabric_core.testing.programs.training import Training

MESSAGE = "has had enough"


def main(arguments: dict[str, Any]) -> None:
    """Train two steps on every rank, and fail on the last one.

    Args:
        arguments: ``folder``: where the time of the failure is written; ``task``: the fields of `Task`.
    """
    task = Task(folder=Path(arguments["folder"]), **arguments["task"])
    with task.fabric() as fabric:
        training = Training(fabric, CASES["plain"], build=task.build)
        training.run(end=2)
        if fabric.global_rank == fabric.world_size - 1:
            (task.folder / "failed").write_text(str(time.time()))
            raise ValueError(f"rank {fabric.global_rank} {MESSAGE}")
        training.run(begin=2)
        fabric.barrier("the end")
        time.sleep(600)  # whoever comes here has not noticed that a rank is missing
