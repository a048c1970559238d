"""Train without end, with workers that load data, and tell when the first step is done. Told to, one rank fails."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import Fabric


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="where each rank writes who it is after its first step")
    parser.add_argument("--fail", type=int, default=-1, help="the rank that raises in its third step")
    args = parser.parse_args()

    fabric = Fabric()
    fabric.launch()
    model = torch.nn.Linear(8, 8)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
    loader = fabric.setup_dataloaders(
        DataLoader(TensorDataset(torch.randn(64, 8)), batch_size=4, num_workers=1)
    )
    step = 0
    while True:
        for (inputs,) in loader:
            fabric.backward(model(inputs).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == 3 and fabric.global_rank == args.fail:
                raise ValueError(f"rank {args.fail} has had enough")
            if step == 1:
                (args.folder / f"{fabric.global_rank}").write_text(str(os.getpid()))


if __name__ == "__main__":
    main()
