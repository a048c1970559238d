"""A training with random numbers from every generator, the device's among them: whole, interrupted, and resumed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

SAVED = (3, 4, 5)
"""After which steps: in the middle of the first epoch, at its end, and after the first batch of the second."""


class Noisy(Dataset[torch.Tensor]):
    """Samples with noise."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index / 32, random.random(), float(np.random.rand()), float(torch.rand(1))])


def train(fabric: Any, folder: Path, resume: int | None = None, save: bool = True) -> dict[str, Any]:
    """Train on 8 samples per step, and save after some steps; or go on from such a checkpoint."""
    fabric.seed_everything(3 if resume is None else 4)
    raw = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 40), nn.Dropout(0.1), nn.Linear(40, 1))
    model, optimizer = fabric.setup(raw, torch.optim.Adam(raw.parameters(), lr=0.05))
    replicas = fabric.strategy.sampler_arguments["num_replicas"]
    loader = fabric.setup_dataloaders(DataLoader(Noisy(), batch_size=8 // replicas, shuffle=True))
    if resume is None:
        random.seed(5 + fabric.global_rank)
        torch.manual_seed(6 + fabric.global_rank)
        torch.rand(3 + fabric.global_rank, device=fabric.device)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader, "steps": 0}
    if resume is not None:
        fabric.load(folder / str(resume), state)
    seen, losses = [], []
    for _ in range(loader.epoch, 2):
        for batch in loader:
            seen.append(batch.cpu().tolist())
            loss = model(batch).square().mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            state["steps"] += 1
            if save and state["steps"] in SAVED:
                fabric.save(folder / str(state["steps"]), state, wait=state["steps"] % 2 == 0)
    fabric.save(folder / "end", {"model": model, "optimizer": optimizer})
    ended = fabric.load(folder / "end")
    return {
        "seen": seen,
        "losses": [loss.item() for loss in losses],
        "weights": ended["model"],
        "moments": [entry["exp_avg"] for entry in ended["optimizer"]["state"].values()],
        "next": torch.rand(3, device=fabric.device).cpu().tolist(),
    }


def same(whole: dict[str, Any], rest: dict[str, Any]) -> list[str]:
    """What of a resumed training is not bit for bit as in one that is whole."""
    count = len(rest["seen"])
    equal = {
        "seen": rest["seen"] == whole["seen"][len(whole["seen"]) - count :],
        "losses": rest["losses"] == whole["losses"][len(whole["losses"]) - count :],
        "weights": all(torch.equal(whole["weights"][name], value) for name, value in rest["weights"].items()),
        "moments": all(map(torch.equal, whole["moments"], rest["moments"])),
        "next": rest["next"] == whole["next"],
    }
    return [name for name, is_equal in equal.items() if not is_equal]


def compare(opened: Any, folder: Path) -> dict[str, Any]:
    """Train once without a save, once with saves, and go on from each of these."""
    trained = {}
    for name, resume in {"unsaved": None, "saved": None, **{str(step): step for step in SAVED}}.items():
        with opened() as fabric:
            fabric.launch()
            torch.rand(7, device=fabric.device)
            trained[name] = train(fabric, folder, resume, save=name == "saved")
    whole = trained.pop("unsaved")
    return {
        "differences": {name: same(whole, rest) for name, rest in trained.items()},
        "steps": {name: len(rest["seen"]) for name, rest in trained.items()},
        "losses": whole["losses"],
    }
