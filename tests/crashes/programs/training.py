"""A small training that goes on where it was, and leaves word of everything that it did."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from points import Board, Moments, Plan
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fabric_core import CheckpointError, Fabric, seed_everything
from fabric_core.sharded.reading import verify

EPOCHS = 2
SAMPLES = 64
BATCH = 4
EVERY = 2
RANKS = 2
WORKERS = 1
STEPS = EPOCHS * SAMPLES // BATCH // RANKS


@dataclass(frozen=True)
class Job:
    """One attempt.

    Attributes:
        folder: Where everything lies: ``checkpoints``, and one log per rank.
        board: Shared with the parent.
        plan: What happens to it.
    """

    folder: Path
    board: Board
    plan: Plan | None = None


class Numbers(Dataset[tuple[int, Tensor, Tensor]]):
    """Samples that know their number, and are augmented at random."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.inputs = torch.randn(SAMPLES, 8, generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, number: int) -> tuple[int, Tensor, Tensor]:
        noise = torch.rand(8) + random.random()
        return number, self.inputs[number] + noise, self.inputs[number].roll(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 33), nn.Linear(33, 8)
        self.dropout = nn.Dropout(0.2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.dropout(torch.relu(self.first(inputs))))


class Log:
    """One line for each step of a rank: number of the step, samples, loss to the last bit."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rest = path.with_suffix(".new")
        rest.write_text("".join(lines[:step]))
        os.replace(rest, path)

    def add(self, step: int, numbers: Tensor, loss: float) -> None:
        with self.path.open("a") as file:
            file.write(f"{step} {numbers.tolist()} {loss.hex()}\n")


def train(fabric: Fabric, job: Job) -> None:
    """Train until all steps are done. Called on every rank."""
    rank = fabric.global_rank
    folder = job.folder / "checkpoints"
    moments = Moments(folder, rank, job.board, job.plan)
    moments.listen()
    seed_everything(7)
    torch.manual_seed(7 + rank)  # of the dropout
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(
        DataLoader(Numbers(), batch_size=BATCH, shuffle=True, num_workers=WORKERS)
    )
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader, "step": 0}
    checkpoints = fabric.checkpoints(folder, keep=2, keep_best=("loss", "max"), every=EVERY)
    if fabric.is_global_zero:
        look(fabric, job.folder, checkpoints_of(folder))
    moments.enter("load")
    checkpoints.resume(state)
    log = Log(job.folder / f"log-{rank}", state["step"])
    moments.enter("step")
    for _ in range(loader.epoch, EPOCHS):
        for numbers, inputs, targets in loader:
            loss = nn.functional.mse_loss(model(inputs), targets)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            state["step"] += 1
            log.add(state["step"], numbers, loss.item())
            if checkpoints.due(state["step"]):
                mean = fabric.all_reduce(loss.detach())
                moments.enter("save")
                waits = state["step"] % (2 * EVERY) > 0  # every other save is made while the training goes on
                checkpoints.save(state, state["step"], metrics={"loss": mean}, wait=waits)
                promise(fabric, job.folder, state["step"] - (0 if waits else EVERY))
                moments.enter("step")
    fabric.wait_for_save()
    moments.enter("end")
    whole = fabric.load(checkpoints.latest())
    chosen = [path and path.name for path in (checkpoints.latest(), checkpoints.best())]
    metrics = [(each.step, each.metrics) for each in checkpoints if each.path.name in chosen]
    if fabric.is_global_zero:
        (job.folder / "modules").write_text("\n".join(sys.modules))
        (job.folder / "final").write_text(json.dumps([chosen, metrics, plain(whole)], indent=1))


def checkpoints_of(folder: Path) -> list[Path]:
    """Everything that looks like a finished checkpoint."""
    entries = sorted(folder.iterdir()) if folder.exists() else []
    return [entry for entry in entries if entry.name.startswith("step-") and entry.suffix != ".json"]


def look(fabric: Fabric, folder: Path, there: list[Path]) -> None:
    """Complain of checkpoints that are damaged, and of one that was promised and is not there. Called on rank 0."""
    step = promised_step(folder)
    complaints = []
    if step > max((int(path.name.split("-")[1]) for path in there), default=0):
        complaints.append(f"step {step} is lost; there are {[path.name for path in there]}")
    for path in there:
        try:
            verify(path, fabric.strategy.surroundings.checkpoint_io.load)
        except CheckpointError as error:
            complaints.append(f"torn: {error}")
    if complaints:
        with (folder / "complaints").open("a") as file:
            file.writelines(f"{each}\n" for each in complaints)


def promise(fabric: Fabric, folder: Path, step: int) -> None:
    """Remember that ``save`` has returned."""
    if fabric.is_global_zero:
        new = folder / "promised.new"
        new.write_text(str(step))
        os.replace(new, folder / "promised")


def promised_step(folder: Path) -> int:
    """The last step for which ``save`` has returned."""
    promised = folder / "promised"
    return int(promised.read_text()) if promised.exists() else 0


def plain(tree: Any) -> Any:
    """A tree with the checksum of every bit of a tensor in its place."""
    if isinstance(tree, dict):
        return {str(key): plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    if isinstance(tree, Tensor):
        content = tree.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{tree.dtype} {list(tree.shape)} {hashlib.sha256(content).hexdigest()}"
    return tree
