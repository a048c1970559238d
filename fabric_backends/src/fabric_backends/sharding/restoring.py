"""Bringing saved states into the form that a sharded model or optimizer loads: each rank reads what it holds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fabric_backends.sharding.folder import ShardedFolder, StoredTensor
from fabric_backends.sharding.tensors import is_sharded, sharded_like


class Reading:
    """Collects what has to be read from folders, to read it in one go."""

    def __init__(self) -> None:
        self._targets: dict[ShardedFolder, dict[str, Tensor]] = {}

    def fitting(self, value: Any, like: Any) -> Any:
        """A saved value in the form of what it is for; read, if it has to be, by `finish`.

        Args:
            value: A tensor, one that lies in a folder, or anything else, which is left as it is.
            like: A tensor. When it is sharded and of the same shape, only the part of this rank is read.
        """
        fits = is_sharded(like) and value.shape == like.shape if _is_tensor(value) else False
        if isinstance(value, StoredTensor):
            target = _empty(value, like if fits else None)
            self._targets.setdefault(value.folder, {})[value.name] = target
            return target
        return sharded_like(value, like) if fits and not is_sharded(value) else value

    def finish(self) -> None:
        """Read everything. Errors as `ShardedFolder.read_into`."""
        for folder, targets in self._targets.items():
            folder.read_into(targets)


def module_state_for(module: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of a module, in the form that its ``load_state_dict`` takes. Called on every rank.

    What the module does not have, or has in another shape, is not read, but there for it to complain of.
    """
    reading, own = Reading(), module.state_dict()
    result = copy.copy(state)
    for name, value in state.items():
        like = own.get(name)
        if isinstance(value, StoredTensor) and (like is None or like.shape != value.shape):
            fitting: Any = torch.empty(value.shape, dtype=value.dtype, device="meta")
        else:
            fitting = reading.fitting(value, like)
        result[name] = fitting  # type: ignore[index]
    reading.finish()
    return result


def optimizer_state_for(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer, in the form that its ``load_state_dict`` takes. Called on every rank."""
    reading = Reading()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    belongs = dict(zip(numbers, parameters, strict=False))  # the optimizer itself complains of other lengths
    entries = {
        number: {name: reading.fitting(value, belongs.get(number)) for name, value in entry.items()}
        if isinstance(entry, Mapping)
        else entry
        for number, entry in state["state"].items()
    }
    reading.finish()
    return {**state, "state": entries}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | StoredTensor)


def _empty(stored: StoredTensor, like: DTensor | None) -> Tensor:
    if like is None:
        return torch.empty(stored.shape, dtype=stored.dtype)
    return torch.empty_like(like, dtype=stored.dtype, requires_grad=False)
