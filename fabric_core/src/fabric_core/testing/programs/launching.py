"""``fabric.launch`` in one process, twice: as in a script or a notebook that starts its processes itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fabric_core.testing.programs.task import Task


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Launch twice, each time with a ``Fabric`` of its own.

    Args:
        arguments: ``folder``, ``devices``; ``task``: the fields of `Task`.
    """
    task = Task(folder=Path(arguments["folder"]), **arguments["task"])
    results = []
    for number in range(2):
        fabric = task.fabric(devices=arguments["devices"])
        results.append(fabric.launch(_in_rank, number, str(task.folder)))
        fabric.close()
    return {"results": results}


def _in_rank(fabric: Any, number: int, folder: str) -> str:
    """Note that this rank was here, and say who it is."""
    total = fabric.all_reduce(float(fabric.global_rank + 1), reduce_op="sum").item()
    note = f"{fabric.world_size} {os.getpid()} {total:g}"
    Path(folder, f"launch-{number}-rank-{fabric.global_rank}").write_text(note)
    fabric.barrier("noted")
    return f"rank {fabric.global_rank} of launch {number}"
