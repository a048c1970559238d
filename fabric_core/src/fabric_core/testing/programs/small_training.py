"""A training of a few steps, and the plain PyTorch loop that it has to equal.

Where several parts are to be tried in one start of processes, each asks for what it wants through the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 6
BATCH = 8
"""How many samples a step has, over all ranks."""

SMALL = 64
"""What losses are divided by, and the learning rate multiplied with: so that a loss that is scaled by 2**16, as is
usual in float16, has gradients in the range of float16."""

CLIPPED = 0.5 / SMALL
"""A norm that the gradients of every step exceed."""


class Net(nn.Module):
    """Two layers: (N, 6) to (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.last = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (N, 6) to (N, 2)."""
        result: Tensor = self.last(torch.tanh(self.first(x)))
        return result


def model() -> Net:
    """The model, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Net()


def loss_of(output: Tensor, targets: Tensor) -> Tensor:
    """The loss of a batch, not in half precision."""
    wide = torch.promote_types(output.dtype, torch.float32)
    return nn.functional.mse_loss(output.to(wide), targets.to(wide)) / SMALL


def batches() -> list[tuple[Tensor, Tensor]]:
    """The batches of all ranks: inputs of shape (`BATCH`, 6), targets of shape (`BATCH`, 2)."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(STEPS, BATCH, 6, generator=generator)
    targets = torch.stack([inputs.sum(-1), inputs.prod(-1)], dim=-1)
    return list(zip(inputs, targets, strict=True))


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a model."""
    return torch.optim.SGD(module.parameters(), lr=0.05 * SMALL, momentum=0.9)


def plain(
    weights: torch.dtype = torch.float32,
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    most: float | None = None,
) -> dict[str, Any]:
    """The plain loop, on the CPU.

    Args:
        weights: Of the model and its inputs.
        inside: The context of a forward pass.
        most: What the norm of the gradients is clipped to.

    Returns:
        ``losses``, and the ``parameters`` at the end.
    """
    module = model().to(weights)
    steps, losses = optimizer(module), []
    for inputs, targets in batches():
        with inside():
            output = module(inputs.to(weights))
        loss = loss_of(output, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        if most is not None:
            nn.utils.clip_grad_norm_(module.parameters(), most)
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "parameters": _parameters(module)}


def train(fabric: Any, most: float | None = None) -> dict[str, Any]:
    """The same through a ``Fabric``, of which every rank takes its part of each batch.

    Returns:
        As `plain`: the losses are means over the ranks.
    """
    module = model()
    setup, steps = fabric.setup(module, optimizer(module))
    losses = []
    for inputs, targets in batches():
        inputs, targets = (
            part[fabric.global_rank :: fabric.world_size].to(fabric.device) for part in (inputs, targets)
        )
        loss = loss_of(setup(inputs), targets)
        fabric.backward(loss)
        if most is not None:
            fabric.clip_gradients(setup, steps, max_norm=most)
        steps.step()
        steps.zero_grad()
        losses.append(fabric.all_reduce(loss.detach()).item())
    return {"losses": losses, "parameters": _parameters(setup)}


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference between two trainings, in losses and parameters."""
    losses = max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))
    assert one["parameters"].keys() == other["parameters"].keys(), "the parameters have other names"
    between = (
        float((one["parameters"][name].double() - value.double()).abs().max())
        for name, value in other["parameters"].items()
    )
    return float(max(losses, *between))


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train, and say who this rank was.

    Args:
        arguments: ``fabric``: arguments of ``Fabric``; ``part``: a kind, a name and options of one more part;
            ``most``: what the norm of the gradients is clipped to.
    """
    from fabric_core import Fabric
    from fabric_core.testing.parts import part_of

    parts = [part_of(*part) for part in arguments.get("parts", ())]
    with Fabric(**arguments.get("fabric", {}), plugins=parts or None) as fabric:
        fabric.launch()
        trained = train(fabric, arguments.get("most"))
        return {
            **trained,
            "rank": (fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.world_size),
            "device": str(fabric.device),
        }


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
