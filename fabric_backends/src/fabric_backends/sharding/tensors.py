"""Sharded tensors (``DTensor``) and the part of them that lies on this rank."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from fabric_core.sharded.boxes import Box, whole_box
from fabric_core.sharded.shares import Share


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
        target.copy_(full.detach()[box_of(like).within(whole_box(full.shape))])
    return part


def box_of(tensor: DTensor) -> Box:
    """Which part of the whole lies on this rank, which has one."""
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def share_of(tensor: DTensor) -> Share:
    """What this rank writes of a sharded tensor: of copies, the first rank of the mesh that has one."""
    coordinate = tensor.device_mesh.get_coordinate()
    is_first = coordinate is not None and all(
        not isinstance(placement, Replicate) or place == 0
        for placement, place in zip(tensor.placements, coordinate, strict=True)
    )
    local = local_part(tensor)
    parts = ((box_of(tensor), local),) if is_first and local.numel() else ()
    return Share(tensor.shape, tensor.dtype, parts)
