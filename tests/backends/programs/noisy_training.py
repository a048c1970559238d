"""A training with numbers from every generator, which differ between the ranks: whole, interrupted, and resumed."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fabric_core import Fabric, seed_everything

BATCH = 8  # over all ranks
SAMPLES = 32


class Noisy(Dataset):
    """Samples with noise; counts how often it is read in this process."""

    def __init__(self, noise: float) -> None:
        self.noise, self.reads = noise, 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        self.reads += 1
        noise = [random.random(), float(np.random.rand()), float(torch.rand(1))]
        return torch.tensor([index / SAMPLES, *(number * self.noise for number in noise)])


def train(
    fabric: Fabric,
    folder: Path | str,
    resume: Path | str | None = None,
    noise: float = 1.0,
    dropout: float = 0.3,
    epochs: int = 2,
    keep: tuple[int, ...] = (2, 4, 5),
    seed: int = 3,
    **options: Any,
) -> dict[str, Any]:
    """Train, and save after some steps and at the end; or go on from such a checkpoint, and save at the end.

    Args:
        fabric, folder, resume: On what, where to save to, and what to go on from.
        noise: How much of it samples have.
        dropout: Of the model.
        epochs: How many there are in all.
        keep: After which steps of a training that begins to save.
        seed: Of everything; a training that goes on has no use for it.
        options: Of the loader.

    Returns:
        The samples that this rank has ``seen``, by batches; the ``losses``, averaged over the ranks; how often the data
        set was read in this process; and the whole checkpoint at the ``end``.
    """
    seed_everything(seed)
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(dropout), torch.nn.Linear(8, 1))
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.02))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    data = Noisy(noise)
    loader = DataLoader(data, batch_size=BATCH // fabric.world_size, shuffle=True, **options)
    loader = fabric.setup_dataloaders(loader)
    torch.manual_seed(seed + 100 * fabric.global_rank)
    random.seed(seed + fabric.global_rank)
    state: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
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
            scheduler.step()
            losses.append(float(fabric.all_reduce(loss.detach())))
            state["steps"] += 1
            if resume is None and state["steps"] in keep:
                fabric.save(f"{folder}/{state['steps']}", state)
    fabric.save(f"{folder}/end", state)
    return {"seen": seen, "losses": losses, "reads": data.reads, "end": fabric.load(f"{folder}/end")}


def rests(fabric: Fabric, folder: str, points: tuple[int, ...] = (2, 4, 5), **options: Any) -> Any:
    """A training that is whole, and for each point whether one that goes on there has the same bits, and its reads."""
    whole = train(fabric, folder, **options)
    found = []
    for point in points:
        rest = train(fabric, f"{folder}-{point}", f"{folder}/{point}", seed=50, **options)
        found.append((is_rest(whole, rest), len(rest["seen"]), rest["reads"]))
    return whole, found


def is_rest(whole: dict[str, Any], rest: dict[str, Any]) -> bool:
    """Whether a resumed training saw the same, and ended with the very same state, as one that is whole."""
    tails = ((whole[name][len(whole[name]) - len(rest[name]) :], rest[name]) for name in ("seen", "losses"))
    return all(tail == own for tail, own in tails) and is_equal(whole["end"], rest["end"])


def is_equal(one: Any, other: Any) -> bool:
    """Whether two trees of tensors and plain values are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_equal, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def in_order(parts: list[list[Any]]) -> list[Any]:
    """The samples that all ranks have seen, in the order of the whole: ranks take turns at them."""
    ranks = [[sample for batch in part for sample in batch] for part in parts]
    return [sample for turn in zip(*ranks, strict=True) for sample in turn]
