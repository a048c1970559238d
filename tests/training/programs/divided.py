"""One rank fails inside ``with fabric`` while the others wait for it in a collective."""

from __future__ import annotations

import sys
from typing import Any

from fabric_core import Fabric


def work(fabric: Any) -> None:
    with fabric:
        if fabric.global_rank == fabric.world_size - 1:
            raise ValueError("this is the cause")
        fabric.all_reduce(1.0)


if __name__ == "__main__":
    strategy = sys.argv[1]
    fabric = Fabric(strategy=strategy, devices=2)
    if strategy == "ddp":
        fabric.launch()
        work(fabric)
    else:
        fabric.launch(work)
