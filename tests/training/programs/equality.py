"""The same training twice: through ``Fabric`` in the processes of a job, and as a plain PyTorch loop in one.

As a program it trains every case and writes the final parameters; the test imports it for the plain loops.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

RANKS = 2
BATCH = 4  # per rank
DTYPES = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}
AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One way to train."""

    precision: str = "32-true"
    every: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    two_optimizers: bool = False

    @property
    def batches(self) -> int:
        """Twenty steps; with accumulation the last window is one micro-batch short."""
        return 20 if self.every == 1 else 20 * self.every - 1


FLOAT32 = {
    "plain": Case(),
    "accumulate": Case(every=3),
    "clip by norm": Case(clip_norm=0.05),
    "clip by value": Case(clip_value=0.01),
    "two optimizers": Case(two_optimizers=True),
    "everything": Case(every=3, clip_norm=0.05, two_optimizers=True),
}
OTHERS = {
    f"{precision}, {name}": Case(precision, every, clip_norm=clip, two_optimizers=two)
    for precision in (*DTYPES, *AUTOCAST)
    for name, every, clip, two in (("plain", 1, None, False), ("everything", 3, 0.05, True))
}
CASES = {**FLOAT32, **OTHERS}


class Net(nn.Module):
    """Two layers: (N, 6) to (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.last = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


def make(case: Case) -> tuple[Net, list[torch.optim.Optimizer], TensorDataset]:
    torch.manual_seed(1)
    model = Net()
    inputs = torch.randn(case.batches * RANKS * BATCH, 6)
    dataset = TensorDataset(inputs, torch.stack([inputs.sum(1), inputs.prod(1)], dim=1))
    return model, optimizers_of(model, case), dataset


def optimizers_of(model: Net, case: Case) -> list[torch.optim.Optimizer]:
    if not case.two_optimizers:
        return [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)]
    return [
        torch.optim.SGD(model.first.parameters(), lr=0.05, momentum=0.9),
        torch.optim.SGD(model.last.parameters(), lr=0.02, nesterov=True, momentum=0.5),
    ]


def windows(case: Case) -> list[int]:
    """The length of each window of micro-batches."""
    full, rest = divmod(case.batches, case.every)
    return [case.every] * full + [rest] * bool(rest)


def train_plain(case: Case, shares: int) -> dict[str, torch.Tensor]:
    """A plain loop over the global batches, in one process.

    Args:
        case: How to train.
        shares: In how many parts each batch is computed; the gradients are averaged. With as many parts as the job
            has ranks, the same kernels run on the same numbers.
    """
    model, _, dataset = make(case)
    model.to(DTYPES.get(case.precision, torch.float32))
    optimizers = optimizers_of(model, case)
    scaler = torch.amp.GradScaler("cpu", enabled=case.precision == "16-mixed")
    batches = iter(DataLoader(dataset, batch_size=RANKS * BATCH))
    parameters = list(model.parameters())
    for length in windows(case):
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        micro_batches = [next(batches) for _ in range(length)]
        for share in range(shares):
            for inputs, targets in micro_batches:
                loss = plain_loss(model, case, inputs[share::shares], targets[share::shares])
                scaler.scale(loss / length).backward()
            for total, parameter in zip(totals, parameters, strict=True):
                total += parameter.grad / shares
                parameter.grad = None
        for total, parameter in zip(totals, parameters, strict=True):
            parameter.grad = total
        for optimizer in optimizers:
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            scaler.unscale_(optimizer)
            if case.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(own, case.clip_norm)
            if case.clip_value is not None:
                torch.nn.utils.clip_grad_value_(own, case.clip_value)
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def plain_loss(model: Net, case: Case, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch's own way of each precision."""
    dtype = AUTOCAST.get(case.precision)
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        output = model(inputs.to(DTYPES.get(case.precision, torch.float32)))
        if case.precision == "64-true":
            return mse_loss(output, targets.double())
        return mse_loss(output.float(), targets)


def train_fabric(case: Case, fabric: Any) -> dict[str, torch.Tensor]:
    """The same through the verbs."""
    model, optimizers, dataset = make(case)
    model, *optimizers = fabric.setup(model, *optimizers)
    loader = fabric.setup_dataloaders(DataLoader(dataset, batch_size=RANKS * BATCH // fabric.world_size))
    for inputs, targets in loader:
        with fabric.accumulate(model, every=case.every):
            output = model(inputs)
            fabric.backward(mse_loss(output, targets.to(output.dtype)))
            for optimizer in optimizers:
                if case.clip_norm is not None:
                    fabric.clip_gradients(model, optimizer, max_norm=case.clip_norm)
                if case.clip_value is not None:
                    fabric.clip_gradients(model, optimizer, clip_val=case.clip_value)
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def main() -> None:
    from fabric_core import Fabric

    results = {}
    for name, case in CASES.items():
        with Fabric(precision=case.precision, strategy="ddp") as fabric:
            fabric.launch()
            results[name] = train_fabric(case, fabric)
            gathered = fabric.all_gather(results[name])
            assert all(torch.equal(ranks[0], rank) for ranks in gathered.values() for rank in ranks), name
            zero = fabric.is_global_zero
    if zero:
        torch.save(results, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
