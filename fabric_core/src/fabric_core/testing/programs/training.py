"""The training of the plain loop, through ``Fabric``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from fabric_core.testing.plain_loop import GLOBAL_BATCH, Build, Case, Net, Parameters, Trained, make, probe


class Training:
    """The model, its optimizers and its data, set up by one ``Fabric``."""

    def __init__(self, fabric: Any, case: Case, seed: int = 1, build: Build = Net) -> None:
        raw, optimizers, dataset = make(case, seed, build)
        self.fabric, self.case, self.build = fabric, case, build
        self.model, *self.optimizers = fabric.setup(raw, *optimizers)
        self.replicas = fabric.strategy.sampler_arguments["num_replicas"]
        self.loader = fabric.setup_dataloaders(DataLoader(dataset, batch_size=GLOBAL_BATCH // self.replicas))
        self.losses: list[float] = []
        self.norms: list[float] = []

    def run(self, begin: int = 0, end: int | None = None) -> None:
        """Train on the batches from ``begin`` to ``end``, exclusive."""
        for number, (inputs, targets) in enumerate(self.loader):
            if begin <= number < (self.case.batches if end is None else end):
                self._micro_batch(inputs, targets)

    def _micro_batch(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        fabric, case = self.fabric, self.case
        with fabric.accumulate(self.model, every=case.every):
            output = self.model(inputs)
            loss = mse_loss(output, targets.to(output.dtype))
            fabric.backward(loss, model=self.model)
            for optimizer in self.optimizers:
                if case.clip_norm is not None:
                    norm = fabric.clip_gradients(self.model, optimizer, max_norm=case.clip_norm)
                    self.norms += [] if norm is None else [float(norm)]
                if case.clip_value is not None:
                    fabric.clip_gradients(self.model, optimizer, clip_val=case.clip_value)
                optimizer.step()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        self.losses.append(fabric.all_reduce(loss.detach()).item())

    @property
    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {
            "model": self.model,
            "optimizers": list(self.optimizers),
            "losses": self.losses,
            "norms": self.norms,
        }

    def restore(self, path: Path) -> None:
        """Go back to where the training was that was saved there."""
        self.fabric.load(path, state := self.state)
        self.losses, self.norms = state["losses"], state["norms"]

    def whole(self, path: Path) -> Parameters:
        """The whole parameters, wherever they are kept: what a checkpoint of the model holds."""
        self.fabric.save(path, {"model": self.model})
        loaded = self.fabric.load(path)["model"]
        return {name: value.clone() for name, value in loaded.items()}

    def outputs(self) -> torch.Tensor:
        """What the model makes of the probe, on this rank."""
        with torch.no_grad():
            output: torch.Tensor = self.model(self.fabric.to_device(probe()))
        return output.cpu().clone()  # plain, also where it was the promise of a collective

    def result(self, folder: Path) -> Trained:
        """What came out. Called on every rank."""
        return Trained(self.losses, self.whole(folder / "end"), self.norms)
