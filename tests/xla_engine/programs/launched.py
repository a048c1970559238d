"""A training in processes that torch_xla starts: ``launched.py LAUNCHER FOLDER``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from fabric_core import Fabric, FabricError
from fabric_core.testing.plain_loop import Case, make

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR")


def train(fabric: Any, case: Case, parent: int) -> dict[str, Any]:
    raw, optimizers, dataset = make(case)
    model, optimizer = fabric.setup(raw, *optimizers)
    for inputs, targets in fabric.setup_dataloaders(DataLoader(dataset, batch_size=8)):
        fabric.backward(mse_loss(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
    fabric.barrier("end")
    nested = Fabric(accelerator="tpu")
    return {
        "parameters": {name: value.detach() for name, value in model.state_dict().items()},
        "own process": os.getpid() != parent,
        "ranks": {name: os.environ.get(name) for name in RANKS},
        "seed": os.environ.get("FABRIC_SEED"),
        "nested": [nested.plan.cluster_environment.name, nested.plan.launcher, nested.world_size],
        "broadcast": fabric.broadcast({"a": torch.ones(2, device=fabric.device)})["a"].device.type,
    }


def fail(fabric: Any) -> None:
    raise ValueError(f"on purpose, on rank {fabric.global_rank}")


def vanish(fabric: Any) -> None:
    os._exit(3)


def told(launcher: str, function: Any, *args: Any) -> str:
    try:
        opened(launcher).launch(function, *args)
    except FabricError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def opened(launcher: str) -> Any:
    return Fabric(accelerator="tpu", devices=1, plugins=launcher)


def main(launcher: str, folder: Path) -> None:
    fabric = opened(launcher)
    fabric.seed_everything(11)
    result = fabric.launch(train, Case(), os.getpid())
    torch.save(result.pop("parameters"), folder / "parameters.pt")
    answers = {
        "result": result,
        "failed": told(launcher, fail),
        "vanished": told(launcher, vanish),
        "local function": told(launcher, lambda fabric: None),
        "no function": told(launcher, None),
        "left behind": [name for name in (*RANKS, "PJRT_LOCAL_PROCESS_RANK") if name in os.environ],
    }
    with Fabric(accelerator="tpu", devices=1) as here:
        here.to_device(torch.zeros(1))
    answers["in use"] = told(launcher, fail)
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
