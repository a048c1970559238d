"""Bringing saved states into the form that a sharded model or optimizer loads: each rank reads what it holds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_backends.sharding.tensors import box_of, is_sharded, local_part
from fabric_core.memory import in_large_pages
from fabric_core.sharded.boxes import Box, whole_box
from fabric_core.sharded.stored import Begin, StoredTensor, reading


def fitting(value: Any, like: Any, begin: Begin, in_place: bool = False) -> Any:
    """A saved value in the form of what it is for; it may be there later only.

    Args:
        value: A tensor, one that lies in a folder, or anything else, which is left as it is.
        like: A tensor. When it is sharded and of the same shape, only the part of this rank is read.
        begin: What reads it (`fabric_core.sharded.stored.reading`).
        in_place: Read into ``like`` itself, if it can be, and return it.
    """
    fits = is_sharded(like) and value.shape == like.shape if _is_tensor(value) else False
    if not fits:
        return value.read(begin) if isinstance(value, StoredTensor) else value
    if is_sharded(value):
        return value
    in_place = in_place and like.dtype == value.dtype
    part = like if in_place else torch.empty_like(like, dtype=value.dtype, requires_grad=False)
    target = local_part(part) if in_place else in_large_pages(local_part(part))
    if target.numel():
        begin(_read_into, target, value, box_of(like))
    return part


def module_state_for(module: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of a module, in the form that its ``load_state_dict`` takes. Called on every rank.

    What the module does not have, or has in another shape, is not read, but there for it to complain of. Where there is
    nothing to complain of, shards are read into their place, so that no memory is needed for a second model.
    """
    own = module.state_dict(keep_vars=True)
    fits = own.keys() == state.keys() and all(
        getattr(own[name], "shape", None) == value.shape for name, value in state.items() if _is_tensor(value)
    )
    result = copy.copy(state)
    with reading() as begin:
        for name, value in state.items():
            like = own.get(name)
            if isinstance(value, StoredTensor) and (like is None or like.shape != value.shape):
                result[name] = torch.empty(value.shape, dtype=value.dtype, device="meta")  # type: ignore[index]
            else:
                result[name] = fitting(value, like, begin, in_place=fits)  # type: ignore[index]
    return result


def optimizer_state_for(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer, in the form that its ``load_state_dict`` takes. Called on every rank."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    belongs = dict(zip(numbers, parameters, strict=False))  # the optimizer itself complains of other lengths
    with reading() as begin:
        entries = {
            number: {name: fitting(value, belongs.get(number), begin) for name, value in entry.items()}
            if isinstance(entry, Mapping)
            else entry
            for number, entry in state["state"].items()
        }
    return {**state, "state": entries}


def _read_into(target: Tensor, value: Tensor | StoredTensor, box: Box) -> None:
    if isinstance(value, StoredTensor):
        value.read_into([(box, target)])
    else:  # may be mapped from a file, and is read here
        target.copy_(value.detach()[box.within(whole_box(value.shape))])


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | StoredTensor)
