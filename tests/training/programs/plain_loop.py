"""A small training, and the plain PyTorch loop of it: what every strategy and every precision has to reproduce."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

GLOBAL_BATCH = 8  # over all ranks
STEPS = 20
DTYPES = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}
AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}

Parameters = dict[str, torch.Tensor]


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
        return STEPS if self.every == 1 else STEPS * self.every - 1


@dataclass
class Trained:
    """What a training leaves: the loss of each micro-batch, over all ranks, and the final parameters."""

    losses: list[float]
    parameters: Parameters


class Net(nn.Module):
    """Two layers: (N, 6) to (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.last = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


def make(case: Case, seed: int = 1) -> tuple[Net, list[torch.optim.Optimizer], TensorDataset]:
    """The model and its optimizers, and the data, which are the same for every seed."""
    torch.manual_seed(0)
    inputs = torch.randn(case.batches * GLOBAL_BATCH, 6)
    dataset = TensorDataset(inputs, torch.stack([inputs.sum(1), inputs.prod(1)], dim=1))
    torch.manual_seed(seed)
    model = Net()
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


def train_plain(case: Case, shares: int = 1, master: bool = False) -> Trained:
    """A plain loop over the global batches, in one process.

    Args:
        case: How to train.
        shares: In how many parts each batch is computed; the gradients are averaged. With as many parts as a job has
            ranks, the same kernels run on the same numbers.
        master: Compute in the half precision of the case, and keep and update the weights in float32.
    """
    model, optimizers, dataset = make(case)
    working = _working_copy(model, case, master)
    if working is model:
        model.to(DTYPES.get(case.precision, torch.float32))
        optimizers = optimizers_of(model, case)
    scaler = torch.amp.GradScaler("cpu", enabled=case.precision == "16-mixed")
    batches = iter(torch.utils.data.DataLoader(dataset, batch_size=GLOBAL_BATCH))
    parameters, sources = list(model.parameters()), list(working.parameters())
    losses: list[float] = []
    for length in windows(case):
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        micro_batches = [next(batches) for _ in range(length)]
        seen = torch.zeros(length, dtype=torch.float64)
        for share in range(shares):
            for number, (inputs, targets) in enumerate(micro_batches):
                loss = plain_loss(working, case, inputs[share::shares], targets[share::shares])
                seen[number] += loss.item() / shares
                scaler.scale(loss / length).backward()
            for total, parameter in zip(totals, sources, strict=True):
                total += parameter.grad.to(total.dtype) / shares
                parameter.grad = None
        losses += seen.tolist()
        for total, parameter in zip(totals, parameters, strict=True):
            parameter.grad = total
        step_plain(optimizers, scaler, case)
        if working is not model:
            with torch.no_grad():
                torch._foreach_copy_(sources, parameters)
    return Trained(losses, {name: value.detach().clone() for name, value in model.state_dict().items()})


def step_plain(optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, case: Case) -> None:
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


def _working_copy(model: Net, case: Case, master: bool) -> Net:
    if not master:
        return model
    copy = Net().to(DTYPES.get(case.precision) or AUTOCAST[case.precision])
    copy.load_state_dict(model.state_dict())
    return copy


def plain_loss(model: Net, case: Case, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch's own way of each precision."""
    weights = next(model.parameters()).dtype
    dtype = AUTOCAST.get(case.precision) if weights is torch.float32 else None
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        output = model(inputs.to(weights))
        if case.precision == "64-true":
            return mse_loss(output, targets.double())
        return mse_loss(output.float(), targets)


def difference(one: Parameters, other: Parameters) -> float:
    """The largest difference between the parameters of two trainings."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def moved(parameters: Parameters, case: Case) -> float:
    """How far training went; a comparison of parameters that hardly moved would show nothing."""
    return difference(parameters, make(case)[0].state_dict())
