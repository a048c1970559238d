"""One training, for every engine: through ``Fabric`` in the ranks that it starts, and as a plain loop in one process.

    one_training.py FOLDER [--crash-at STEP] [--wait-at STEP]

Every step is saved, and a run goes on from what was saved. ``--crash-at`` kills the last rank before that step of a
run that began anew; ``--wait-at`` waits there for the cluster to announce the end of the job.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

STEPS, BATCH = 8, 12


def make() -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    inputs = torch.randn(STEPS, BATCH, 5)
    return model, optimizer, inputs, torch.stack([inputs.sum(2), inputs.prod(2)], dim=2)


def train_plain() -> dict[str, torch.Tensor]:
    model, optimizer, inputs, targets = make()
    for step in range(STEPS):
        mse_loss(model(inputs[step]), targets[step]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in model.state_dict().items()}


def train(fabric: Any, folder: Path, crash_at: int = -1, wait_at: int = -1) -> None:
    model, optimizer, inputs, targets = make()
    model, optimizer = fabric.setup(model, optimizer)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    checkpoints = fabric.checkpoints(folder / "checkpoints", keep=2)
    checkpoints.resume(state)
    began, rank, world = state["step"], fabric.global_rank, fabric.world_size
    for step in range(began, STEPS):
        if step == crash_at and began == 0 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = mse_loss(model(inputs[step, rank::world]), targets[step, rank::world])
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        state["step"] = step + 1
        checkpoints.save(state, step + 1)
        if step == wait_at and began == 0:
            (folder / f"waiting-{rank}").touch()
            if must_stop(fabric):
                return
    if rank == 0:
        torch.save({name: value.detach() for name, value in model.state_dict().items()}, folder / "result.pt")
    (folder / f"rank-{rank}.json").write_text(json.dumps(facts(fabric, began)))


def must_stop(fabric: Any) -> bool:
    """Wait until the ranks agree that the end was announced."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if fabric.preempted:
            return True
        time.sleep(0.05)
    return False


def facts(fabric: Any, began: int) -> dict[str, Any]:
    environment = fabric.cluster_environment
    return {
        "environment": fabric.plan.cluster_environment.name,
        "reason": fabric.plan.cluster_environment.reason,
        "strategy": fabric.plan.strategy.name,
        "size": [fabric.plan.processes_per_node, fabric.plan.num_nodes],
        "ranks": [fabric.global_rank, fabric.local_rank, fabric.node_rank],
        "place": [environment.main_address, environment.main_port],
        "began": began,
        "restarts": environment.restart_count,
    }


def main() -> None:
    from fabric_core import Fabric

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--crash-at", type=int, default=-1)
    parser.add_argument("--wait-at", type=int, default=-1)
    arguments = parser.parse_args()
    with Fabric(accelerator="cpu", strategy="ddp") as fabric:
        fabric.launch()
        train(fabric, **vars(arguments))


if __name__ == "__main__":
    main()
