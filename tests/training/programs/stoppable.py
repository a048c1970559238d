"""Train until ``fabric.preempted``, with two backward passes per step, once for every name on the command line.

    stoppable.py FOLDER STRATEGY [STRATEGY …]

Each round, every rank leaves its process id in ``FOLDER/pid-ROUND-RANK`` after some steps, and at the end
``FOLDER/end-ROUND-RANK.json``: at which step it stopped, and the loss of the model that it had then.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset

BATCH, WORLD = 8, 2
MOST_STEPS = 20_000


class Endless(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """One of the two batches after the other."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return 2 * MOST_STEPS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index % 2], self.targets[index % 2]


def make() -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    inputs = torch.randn(2, WORLD * BATCH, 4)  # two batches of every step
    return model, torch.optim.SGD(model.parameters(), lr=1e-4), inputs, inputs.sum(2, keepdim=True)


def loss_after(steps: int) -> float:
    """The loss of the plain loop in one process."""
    model, optimizer, inputs, targets = make()
    for _ in range(steps):
        for batch, target in zip(inputs, targets, strict=True):
            (mse_loss(model(batch), target) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return mse_loss(model(inputs[0]), targets[0]).item()


def train(folder: Path, number: int, strategy: str) -> None:
    from fabric_core import Fabric

    with Fabric(accelerator="cpu", strategy=strategy, devices=WORLD) as fabric:
        fabric.launch()
        model, optimizer, inputs, targets = make()
        model, optimizer = fabric.setup(model, optimizer)
        rank = fabric.global_rank
        mine = slice(rank * BATCH, (rank + 1) * BATCH)
        loader = DataLoader(Endless(inputs, targets), batch_size=None, num_workers=1)
        loader = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
        step = 0
        for number_of_batch, (batch, target) in enumerate(loader):
            last = number_of_batch % 2 == 1
            with fabric.no_backward_sync(model, enabled=not last):
                fabric.backward(mse_loss(model(batch[mine]), target[mine]) / 2)
            if not last:
                continue
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == 3:
                (folder / f"pid-{number}-{rank}.part").write_text(str(os.getpid()))
                (folder / f"pid-{number}-{rank}.part").rename(folder / f"pid-{number}-{rank}")
            if fabric.preempted:
                break
        with torch.no_grad():
            loss = mse_loss(model(inputs[0]), targets[0]).item()
        (folder / f"end-{number}-{rank}.json").write_text(json.dumps([step, loss]))


def main() -> None:
    torch.set_num_threads(1)
    for number, strategy in enumerate(sys.argv[2:]):
        train(Path(sys.argv[1]), number, strategy)


if __name__ == "__main__":
    main()
