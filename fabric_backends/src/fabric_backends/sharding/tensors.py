"""Sharded tensors (``DTensor``) and the part of them that lies on this rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Whether a value is a tensor that is spread over ranks."""
    return isinstance(value, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank: all of a plain one. Shares its memory, and has no graph."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.to_local()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the device of its mesh. Called on every rank of the mesh, in the same order."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():  # shards that were moved to the CPU cannot be sent from there
        there: Any = tensor.detach().to(tensor.device_mesh.device_type)
        full: Tensor = there.full_tensor()
        return full


def sharded_like(full: Tensor, like: DTensor) -> Tensor:
    """Cut out of a tensor what this rank holds of another one of the same shape. Nothing is sent.

    Args:
        full: The whole tensor, on any device; only the part that is needed is read.
        like: A sharded tensor of that shape, also on the meta device.

    Returns:
        A sharded tensor in the dtype of ``full``, on the device of ``like``.
    """
    part = torch.empty_like(like, dtype=full.dtype, requires_grad=False)
    target = local_part(part)
    if target.numel():
        (chunk,) = like.__create_chunk_list__()  # type: ignore[no-untyped-call]
        place = tuple(
            slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
        )
        target.copy_(full.detach()[place])
    return part


def mapped(tree: Any, function: Callable[[Any], Any], kinds: tuple[type, ...] = (Tensor,)) -> Any:
    """Copy dictionaries, lists and tuples, with a function applied to each tensor in them, in their order.

    Dictionaries keep their type and attributes, as state dicts have them; anything else is left as it is.

    Args:
        tree: What to copy.
        function: Gets a tensor, returns what takes its place.
        kinds: What counts as a tensor.
    """
    if isinstance(tree, kinds):
        return function(tree)
    if isinstance(tree, dict):
        result = copy.copy(tree)
        for key, value in tree.items():
            result[key] = mapped(value, function, kinds)
        return result
    if type(tree) in (list, tuple):
        return type(tree)(mapped(value, function, kinds) for value in tree)
    return tree


def named_tensors(tree: Any, wanted: Callable[[Tensor], bool]) -> dict[str, Any]:
    """The tensors in dictionaries, lists and tuples that are wanted, by dotted names, in their order.

    Two that would have one name are told apart by apostrophes; the same tree always gives the same names.
    """
    found: dict[str, Any] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            if wanted(value):
                while name in found:
                    name += "'"
                found[name] = value
            return
        entries: Any = ()
        if isinstance(value, dict):
            entries = value.items()
        elif type(value) in (list, tuple):
            entries = enumerate(value)
        for key, entry in entries:
            visit(entry, f"{name}.{key}" if name else str(key))

    visit(tree, "")
    return found
