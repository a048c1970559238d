"""Loss scaling for gradients that are spread over ranks: each looks at its part, and all skip a step alike."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer

from fabric_backends import collectives
from fabric_backends.sharding.clipping import gradients_of
from fabric_backends.sharding.tensors import is_sharded, local_part


def unscale_shards(scaler: GradScaler, optimizer: Optimizer) -> None:
    """As ``GradScaler.unscale_``, for an optimizer with sharded gradients. Called on every rank of the job.

    An infinity in one rank's part counts on every rank.
    """
    gradients = gradients_of(parameter for group in optimizer.param_groups for parameter in group["params"])
    parts: Any = _Parts([local_part(gradient) for gradient in gradients])
    scaler.unscale_(parts)
    states = scaler._per_optimizer_states
    state = states.pop(id(parts))
    talks_on = next(gradient.device_mesh.device_type for gradient in gradients if is_sharded(gradient))
    found: dict[torch.device, torch.Tensor] = state["found_inf_per_device"]
    here = sum(infinite.to(talks_on) for infinite in found.values())
    anywhere = collectives.all_reduce(torch.as_tensor(here), "max")
    for infinite in found.values():
        infinite.copy_(anywhere)
    states[id(optimizer)] = state


class _Parts:
    """Stands for the optimizer before the scaler, with this rank's parts as the gradients."""

    def __init__(self, gradients: list[torch.Tensor]) -> None:
        self.param_groups = [{"params": [_with_gradient(gradient) for gradient in gradients]}]


def _with_gradient(gradient: torch.Tensor) -> torch.Tensor:
    holder = gradient.detach()
    holder.grad = gradient
    return holder
