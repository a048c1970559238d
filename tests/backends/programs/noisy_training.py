"""A training with numbers from every generator, which differ between the ranks: whole, interrupted, and resumed."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fabric_core import Fabric, seed_everything


class Noisy(Dataset):
    """Samples with noise; counts how often it is read in this process."""

    def __init__(self, noise: float) -> None:
        self.noise, self.reads = noise, 0

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> torch.Tensor:
        self.reads += 1
        noise = [random.random(), float(np.random.rand()), float(torch.rand(1))]
        return torch.tensor([index / 32, *(number * self.noise for number in noise)])


def train(
    fabric: Fabric,
    folder: Path | str | None,
    resume: Path | str | None = None,
    noise: float = 1.0,
    epochs: int = 2,
    keep: tuple[int, ...] = (2, 4, 5),
    seed: int = 3,
    **options: Any,
) -> dict[str, Any]:
    """Train on 8 samples per step, and save after some steps; or go on from such a checkpoint."""
    seed_everything(seed)
    size = 8 // fabric.world_size
    model: Any = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Dropout(0.3 * noise), torch.nn.Linear(8, 1)
    )
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    data = Noisy(noise)
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=size, shuffle=True, **options))
    torch.manual_seed(seed + 100 * fabric.global_rank)
    random.seed(seed + fabric.global_rank)
    state: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "data": {"loader": loader},
        "steps": 0,
    }
    if resume is not None:
        fabric.load(resume, state)
    seen, losses = [], []
    for _ in range(loader.epoch, epochs):
        for batch in loader:
            seen.append(batch.tolist())
            loss = model(batch).square().mean()
            fabric.backward(loss, model=model)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(fabric.all_reduce(loss.detach())))
            state["steps"] += 1
            if resume is None and state["steps"] in keep:
                fabric.save(f"{folder}/{state['steps']}", state)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    weights = {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in weights.items()}
    return {"seen": seen, "losses": losses, "weights": weights, "reads": data.reads}


def same(whole: dict[str, Any], rest: dict[str, Any]) -> bool:
    """Whether a resumed training saw the same samples, and has the same weights, as one that is whole."""
    count = len(rest["seen"])
    equal = all(torch.equal(whole["weights"][name], tensor) for name, tensor in rest["weights"].items())
    return equal and rest["seen"] == whole["seen"][len(whole["seen"]) - count :]
