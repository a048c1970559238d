"""Giving values to modules that were created on the meta device, without ever having all of them in one place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["materialize", "warn_of_undefined"]

RESETS = ("reset_parameters", "_reset_parameters")
"""What modules call the method that gives their parameters their first values; the second is PyTorch's own habit."""


def materialize(modules: Iterable[nn.Module], device: torch.device) -> list[str]:
    """Give memory and first values to what some modules themselves have on the meta device. Called on every rank.

    Modules that share a parameter go on sharing it, if they are given together. The values are those that
    ``reset_parameters`` gives; of a module without it, floating-point ones become NaN, because a loss that is NaN is
    better than one that means nothing, and the others 0.

    Args:
        modules: Inner ones before outer ones.
        device: Where to.

    Returns:
        The names of the classes that have no ``reset_parameters``.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}
    without = []
    for module in modules:
        if not _give_memory(module, device, made):
            continue
        reset = next((getattr(module, name) for name in RESETS if hasattr(module, name)), None)
        if reset is None:
            without.append(type(module).__name__)
        else:
            with torch.device(device), torch.no_grad():
                reset()
    return without


def warn_of_undefined(model: nn.Module, classes: Iterable[str]) -> None:
    """Say that some parameters have no values before a checkpoint is loaded."""
    names = sorted(set(classes))
    if names:
        warnings.warn(
            f"The {type(model).__name__} was created without values (empty_init=True), and {', '.join(names)} has no "
            "method reset_parameters() to give it some: its parameters and buffers are NaN until a checkpoint is "
            "loaded. Load one, or add that method, or create the model without empty_init.",
            UserWarning,
            stacklevel=2,
        )


def _give_memory(module: nn.Module, device: torch.device, made: dict[int, tuple[Tensor, Tensor]]) -> bool:
    """Whether there was anything to give memory to."""
    found = False
    tables: Any = (module._parameters, module._buffers)
    for table in tables:
        for name, tensor in table.items():
            if tensor is not None and tensor.is_meta:
                found = True
                if id(tensor) not in made:
                    made[id(tensor)] = tensor, _made_like(tensor, device)
                table[name] = made[id(tensor)][1]
    return found


def _made_like(tensor: Tensor, device: torch.device) -> Tensor:
    nothing = math.nan if tensor.is_floating_point() or tensor.is_complex() else 0
    values = torch.full_like(tensor, nothing, device=device, requires_grad=False)
    if not isinstance(tensor, nn.Parameter):
        return values
    parameter: Tensor = nn.Parameter(values, tensor.requires_grad)
    return parameter
