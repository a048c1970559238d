"""The strategy ``xla`` in two processes, on a stand-in for torch_xla: ``two_processes.py FOLDER``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import matrix
import torch
import torch.distributed as dist
from torch import nn
from torch_xla.core import xla_model as xm

from fabric_core import AcceleratorSpec, Fabric, FabricError, Inventory
from fabric_xla.accelerator import XLAAccelerator
from fabric_xla.store import SERVED, serve_store
from fabric_xla.strategies.xla import XLAStrategy

FOLDER = Path(sys.argv[1])
RANK = int(os.environ["RANK"])


class Device(XLAAccelerator):
    """The CPU in the place of an XLA device."""

    spec = AcceleratorSpec(
        "stand_in", "two_processes:Device", probe=lambda: Inventory((0, 1)), groups=("xla",)
    )

    def device(self, index: int) -> torch.device:
        return torch.device("cpu")


class OnCPU(XLAStrategy):
    """The strategy, on that device."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")


def opened(**options: Any) -> Any:
    return Fabric(accelerator=Device(), strategy=OnCPU(**options), devices=2)


def told(function: Any, *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except (FabricError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def training() -> dict[str, Any]:
    """Every case of the matrix, and how often gradients were averaged in it."""
    found = {}
    for name, case in matrix.CASES.items():
        with opened() as fabric:
            task = matrix.Training(
                fabric, case, seed=1 + RANK
            )  # rank 1 has to take over the weights of rank 0
            xm.averaged.clear()
            task.run()
            sent = list(xm.averaged)
            found[name] = (task.result(FOLDER), sent)
    return found


def verbs() -> dict[str, Any]:
    with opened() as fabric:
        mine = torch.tensor([1.0 + RANK, 2.0], requires_grad=True)
        gathered = fabric.all_gather(mine, sync_grads=True)
        (gathered * torch.tensor([[1.0, 1.0], [10.0, 10.0]]) * (RANK + 1)).sum().backward()
        order: list[str] = []
        with fabric.rank_zero_first():
            order += [path.name for path in FOLDER.glob("first-*")]
            (FOLDER / f"first-{RANK}").touch()
        found = {
            "ranks": [fabric.world_size, fabric.global_rank, fabric.local_rank],
            "gathered": gathered.detach(),
            "gradient": mine.grad,
            "reduced": {
                op: fabric.all_reduce(mine.detach(), reduce_op=op)
                for op in ("mean", "sum", "min", "max", "product")
            },
            "truths": fabric.all_gather(torch.tensor([RANK == 0])),
            "half": fabric.all_reduce(torch.tensor([1.0 + RANK], dtype=torch.bfloat16)),
            "broadcast": fabric.broadcast({"rank": RANK, "tensor": torch.ones(2) * RANK}, src=1),
            "unsendable": told(fabric.broadcast, lambda: 0),
            "barriers": told(fabric.barrier, f"at {RANK}"),
            "before": order,
            "written": told(fabric.save, FOLDER, {"a": 1}),
            "read": told(fabric.load, FOLDER / ("none" if RANK else "end")),
        }
        fabric.barrier("same")
        return found


class OfRankZero:
    """An object that has a state on rank 0 only."""

    def state_dict(self) -> dict[str, Any]:
        if RANK == 1:
            raise ValueError("of rank 1 alone")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def opened_anew() -> str:
    """What one says to the others is not what was said in the training before."""
    with opened() as fabric:
        fabric.save(FOLDER / "before.ckpt", {"a": 1})
    with opened() as fabric:
        return told(fabric.save, FOLDER / "after.ckpt", {"object": OfRankZero()})


def weights() -> list[torch.Tensor]:
    found = []
    for sync in (True, False):
        with opened(sync_module_states=sync) as fabric:
            torch.manual_seed(RANK)
            found.append(fabric.setup(nn.Linear(2, 2)).weight.detach().clone())
    return found


def meeting_point() -> Any:
    """What the launcher does: serve the store, and say where."""
    told = FOLDER / "store"
    served = serve_store("127.0.0.1", 0) if RANK == 0 else None
    if served is not None:
        (FOLDER / "part").write_text(f"127.0.0.1:{served.port}")
        (FOLDER / "part").rename(told)
    while not told.exists():
        time.sleep(0.02)
    os.environ[SERVED] = told.read_text()
    return served


if __name__ == "__main__":
    served = meeting_point()
    foreign = told(opened().launch)
    os.environ["PJRT_LOCAL_PROCESS_RANK"] = os.environ["LOCAL_RANK"]
    store = dist.FileStore(str(FOLDER / "group"), 2)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=2)
    answers = {"foreign": foreign, "training": training(), "verbs": verbs(), "weights": weights()}
    answers["opened anew"] = opened_anew()
    torch.save(answers, FOLDER / f"answers-{RANK}.pt")
    dist.barrier()
    dist.destroy_process_group()
