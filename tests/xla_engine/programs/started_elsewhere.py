"""A script that calls ``torch_xla.launch`` itself, with a Fabric in the processes: ``started_elsewhere.py FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch_xla
from torch import nn

from fabric_core import Fabric


def train(ordinal: int, folder: str) -> None:
    with Fabric(accelerator="tpu") as fabric:
        fabric.launch()
        model = nn.Linear(2, 1)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        fabric.backward(model(torch.ones(1, 2, device=fabric.device)).sum())
        optimizer.step()
        environment = fabric.plan.cluster_environment
        found = {
            "environment": [environment.name, environment.reason],
            "launcher": fabric.plan.launcher,
            "ranks": [fabric.world_size, fabric.global_rank, fabric.local_rank, fabric.node_rank],
            "address": [
                fabric.strategy.surroundings.cluster_environment.main_address,
                fabric.strategy.surroundings.cluster_environment.single_node,
            ],
            "ordinal": ordinal,
        }
    Path(folder, "answers.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch_xla.launch(train, args=(sys.argv[1],), start_method="fork")
