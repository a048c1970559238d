"""Bringing models and values to XLA devices and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.data.collections import map_tensors

T = TypeVar("T")


def move_modules(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Move what some modules themselves have, in place, so that every parameter stays the object that it was.

    ``module.to`` would make new parameters for an XLA device: optimizers would go on with the old ones, and weights
    that layers share would be torn apart. Exchanging what is inside the objects keeps both.
    """
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for module in modules:
            own: Any = module
            own._apply(lambda tensor: tensor.to(device), recurse=False)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def own_tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The parameters and buffers that some modules themselves have, each once."""
    found: dict[int, Tensor] = {}
    for module in modules:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            found[id(tensor)] = tensor
    return list(found.values())


def move_state(optimizer: Optimizer) -> None:
    """Move what an optimizer has collected so far to where its parameters are now.

    Numbers that it keeps on the host, such as counts of steps, stay there.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                state[name] = value.to(parameter.device)


def on_cpu(data: T) -> T:
    """A copy of a collection in which the tensors of XLA devices are on the CPU.

    Everything that is pending has to be computed before (`fabric_xla.pending.compute`), so that it costs one
    computation and not one for each tensor.
    """

    def fetch(tensor: Tensor) -> Any:
        return tensor.cpu() if tensor.device.type == "xla" else tensor

    return map_tensors(fetch, data)
