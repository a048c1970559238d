"""Saves one and the same state under every strategy of this world size, or loads what all of them have saved.

Called with a folder and ``save``: the folder has the plain files ``right`` and ``wrong``; each strategy loads the right
one and saves it as ``right-STRATEGY-RANKS``. With ``load``: each loads the wrong one, then one of these, and saves
what it has then as ``read-STRATEGY-RANKS-from-OTHER``.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fabric_core import Fabric

WORLD = int(os.environ.get("WORLD_SIZE", "1"))


class Net(nn.Module):
    """Shapes that no number of ranks divides evenly, but for the two layers in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.up, self.down = nn.Linear(7, 8), nn.Linear(8, 7)
        self.last = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.randn(1, 7, 1))
        self.register_buffer("offset", torch.randn(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + self.offset + self.scale.view(-1)
        return self.last(self.down(torch.tanh(self.up(x))))


def divide(model: Any, mesh: Any) -> None:
    parallelize_module(model, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})


STRATEGIES: dict[int, dict[str, dict[str, Any]]] = {
    1: {"single_device": {}, "ddp": {}},
    2: {
        "ddp": {},
        "ddp_sharded": {"engine": "torch"},
        "fsdp": {},
        "tensor_parallel": {"parallelize_fn": divide},
        "deepspeed_stage_1": {},
        "deepspeed_stage_3": {},
    },
    4: {"fsdp": {}, "fsdp_hybrid": {"device_mesh": (2, 2)}},
}
"""By world size: the strategies, and their options."""


def fresh() -> tuple[Any, Any]:
    model = Net()
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def plain_state(seed: int) -> dict[str, Any]:
    """What plain PyTorch would save after some steps."""
    torch.manual_seed(seed)
    model, optimizer = fresh()
    for _ in range(3):
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": seed}


def main() -> None:
    folder, what = Path(sys.argv[1]), sys.argv[2]
    warnings.simplefilter("error")
    for strategy, options in STRATEGIES[WORLD].items():
        with Fabric(accelerator="cpu", strategy=strategy, strategy_options=options) as fabric:
            model, optimizer = fabric.setup(*fresh())
            state = {"model": model, "optimizer": optimizer, "step": 0}
            if what == "save":
                fabric.load(folder / "right", state)
                fabric.save(folder / f"right-{strategy}-{WORLD}", state)
                continue
            for path in sorted(folder.glob("right-*")):
                fabric.load(folder / "wrong", state)
                fabric.load(path, state)
                other = path.name.removeprefix("right-")
                fabric.save(folder / f"read-{strategy}-{WORLD}-from-{other}", state)


if __name__ == "__main__":
    main()
