"""The cases of the matrix on every TPU device, a process each: ``on_tpu.py STRATEGY FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matrix
import torch

from fabric_core import Fabric


def train(fabric: Any, folder: Path, name: str) -> Any:
    task = matrix.Training(fabric, matrix.CASES[name])
    task.run()
    return task.result(folder), fabric.strategy.sampler_arguments["num_replicas"]


def main(strategy: str, folder: Path) -> None:
    found = {}
    for name in matrix.CASES:
        fabric = Fabric(accelerator="tpu", strategy=strategy, precision_options={"matmul": "highest"})
        found[name] = fabric.launch(train, folder, name)
    torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
