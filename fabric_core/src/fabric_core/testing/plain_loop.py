"""A small training, and the plain PyTorch loop of it: what every strategy and every precision has to reproduce."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

GLOBAL_BATCH = 8  # over all ranks
STEPS = 20
DTYPES = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}
AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
PRECISIONS = ("32-true", *DTYPES, *AUTOCAST)
"""The precisions whose casts the plain loop knows."""

Parameters = dict[str, torch.Tensor]
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        precision: One of `PRECISIONS`.
        every: How many micro-batches make a window.
        clip_norm, clip_value: What gradients are clipped to.
        two_optimizers: Whether two optimizers share the parameters.
    """

    precision: str = "32-true"
    every: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    two_optimizers: bool = False

    @property
    def batches(self) -> int:
        """Twenty steps; with accumulation the last window is one micro-batch short."""
        return STEPS if self.every == 1 else STEPS * self.every - 1

    @property
    def full(self) -> int:
        """How many of the batches are in windows of full length."""
        return self.batches - self.batches % self.every


CASES = {
    "plain": Case(),
    "accumulate": Case(every=3),
    "clip by norm": Case(clip_norm=0.05),
    "clip by value": Case(clip_value=0.01),
    "two optimizers": Case(two_optimizers=True),
    "everything": Case(every=3, clip_norm=0.05, two_optimizers=True),
}
"""In float32. In other precisions, ``plain`` and ``everything`` tell a wrong cast from a right one."""


@dataclass
class Trained:
    """What a training leaves.

    Attributes:
        losses: Of each micro-batch, over all ranks.
        parameters: At the end.
        norms: Of the gradients, before each clipping by norm.
        before_last: The parameters before a short last window; empty where there is none.
        outputs: What the trained model makes of `probe`.
    """

    losses: list[float]
    parameters: Parameters
    norms: list[float] = field(default_factory=list)
    before_last: Parameters = field(default_factory=dict)
    outputs: torch.Tensor | None = None


class Net(nn.Module):
    """Two layers: (N, 6) to (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.last = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (N, 6) to (N, 2)."""
        output: torch.Tensor = self.last(torch.tanh(self.first(x)))
        return output


def make(
    case: Case, seed: int = 1, build: Build = Net
) -> tuple[nn.Module, list[torch.optim.Optimizer], TensorDataset]:
    """The model and its optimizers, and the data, which are the same for every seed."""
    torch.manual_seed(0)
    inputs = torch.randn(case.batches * GLOBAL_BATCH, 6)
    dataset = TensorDataset(inputs, torch.stack([inputs.sum(1), inputs.prod(1)], dim=1))
    torch.manual_seed(seed)
    model = build()
    return model, optimizers_of(model, case), dataset


def probe() -> torch.Tensor:
    """What trained models are asked, the same for every rank: shape (5, 6)."""
    return torch.linspace(-1, 1, 30).reshape(5, 6)


def optimizers_of(model: nn.Module, case: Case) -> list[torch.optim.Optimizer]:
    """One for all parameters, or two, each for one half of them."""
    parameters = list(model.parameters())
    if not case.two_optimizers:
        return [torch.optim.SGD(parameters, lr=0.05, momentum=0.9)]
    half = len(parameters) // 2
    return [
        torch.optim.SGD(parameters[:half], lr=0.05, momentum=0.9),
        torch.optim.SGD(parameters[half:], lr=0.02, nesterov=True, momentum=0.5),
    ]


def windows(case: Case) -> list[int]:
    """The length of each window of micro-batches."""
    full, rest = divmod(case.batches, case.every)
    return [case.every] * full + [rest] * bool(rest)


def train_plain(case: Case, shares: int = 1, master: bool = False, build: Build = Net) -> Trained:
    """A plain loop over the global batches, in one process.

    Args:
        case: How to train.
        shares: In how many parts each batch is computed; the gradients are averaged. With as many parts as a job has
            ranks, the same kernels run on the same numbers.
        master: Compute in the half precision of the case, and keep and update the weights in float32.
        build: Makes the model.
    """
    model, optimizers, dataset = make(case, build=build)
    working = _working_copy(model, case, master)
    if working is model:
        model.to(DTYPES.get(case.precision, torch.float32))
        optimizers = optimizers_of(model, case)
    scaler = torch.amp.GradScaler("cpu", enabled=case.precision == "16-mixed")
    batches = iter(torch.utils.data.DataLoader(dataset, batch_size=GLOBAL_BATCH))
    parameters, sources = list(model.parameters()), list(working.parameters())
    trained = Trained([], {})
    for length in windows(case):
        if length < case.every:
            trained.before_last = _copies(model)
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        micro_batches = [next(batches) for _ in range(length)]
        seen = torch.zeros(length, dtype=torch.float64)
        for share in range(shares):
            for number, (inputs, targets) in enumerate(micro_batches):
                loss = plain_loss(working, case, inputs[share::shares], targets[share::shares])
                seen[number] += loss.item() / shares
                _backward(scaler.scale(loss / length))
            for total, parameter in zip(totals, sources, strict=True):
                gradient = parameter.grad
                assert gradient is not None
                total += gradient.to(total.dtype) / shares
                parameter.grad = None
        trained.losses += seen.tolist()
        for total, parameter in zip(totals, parameters, strict=True):
            parameter.grad = total
        trained.norms += step_plain(optimizers, scaler, case)
        if working is not model:
            with torch.no_grad():
                torch._foreach_copy_(list[torch.Tensor](sources), list[torch.Tensor](parameters))
    trained.parameters = _copies(model)
    with torch.no_grad():
        trained.outputs = plain_output(working, case, probe())
    return trained


def step_plain(
    optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, case: Case
) -> list[float]:
    """Clip and step; the norms before clipping."""
    norms = []
    for optimizer in optimizers:
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        scaler.unscale_(optimizer)
        if case.clip_norm is not None:
            norms.append(float(torch.nn.utils.clip_grad_norm_(own, case.clip_norm)))
        if case.clip_value is not None:
            torch.nn.utils.clip_grad_value_(own, case.clip_value)
        scaler.step(optimizer)
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return norms


def plain_loss(model: nn.Module, case: Case, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of a batch, in plain PyTorch's own way of each precision."""
    output = plain_output(model, case, inputs)
    return mse_loss(output, targets.to(output.dtype))


def plain_output(model: nn.Module, case: Case, inputs: torch.Tensor) -> torch.Tensor:
    """What a model makes of inputs; in float32, or in float64 where that is the precision."""
    weights = next(model.parameters()).dtype
    dtype = AUTOCAST.get(case.precision) if weights is torch.float32 else None
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        output: torch.Tensor = model(inputs.to(weights))
    return output if case.precision == "64-true" else output.float()


def gradients(build: Build = Net, share: slice = slice(None), batches: int = 1) -> Parameters:
    """The gradients of the first batches for the first weights, in float32.

    Args:
        build: Makes the model.
        share: Which samples of each batch.
        batches: How many batches are summed.
    """
    model, _, dataset = make(CASES["plain"], build=build)
    inputs, targets = (torch.split(tensor, GLOBAL_BATCH) for tensor in dataset.tensors)
    for number in range(batches):
        _backward(plain_loss(model, CASES["plain"], inputs[number][share], targets[number][share]))
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in model.named_parameters()
    }


def difference(one: Parameters, other: Parameters) -> float:
    """The largest difference between the parameters of two trainings."""
    assert one.keys() == other.keys(), f"{sorted(one)} are there, and {sorted(other)} were expected"
    for name in one:
        assert one[name].shape == other[name].shape, (
            f"{name} has the shape {tuple(one[name].shape)}, not {tuple(other[name].shape)}"
        )
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def moved(parameters: Parameters, case: Case, build: Build = Net) -> float:
    """How far training went; a comparison of parameters that hardly moved would show nothing."""
    return difference(parameters, make(case, build=build)[0].state_dict())


def _working_copy(model: nn.Module, case: Case, master: bool) -> nn.Module:
    if not master:
        return model
    return copy.deepcopy(model).to(DTYPES.get(case.precision) or AUTOCAST[case.precision])


def _backward(loss: torch.Tensor) -> None:
    torch.autograd.backward(loss)


def _copies(model: nn.Module) -> Parameters:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
