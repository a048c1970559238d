"""Over which processes a model is sharded, and over which it is replicated."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import DeviceMesh

from fabric_backends.meshes import make_mesh
from fabric_core.errors import OptionsError

REPLICATE = "replicate"
SHARD = "shard"

MeshShape = tuple[int, ...] | DeviceMesh | None


def check_options(shape: Any, shard_size: Any) -> None:
    """Make sure that the options can be meant.

    Raises:
        OptionsError: They cannot.
    """
    if shape is not None and shard_size not in (None, "node"):
        raise OptionsError(
            f"Both device_mesh={shape!r} and shard_size={shard_size!r} were given; each of them says over how many "
            "processes a model is sharded. Keep one of them."
        )
    right = shape is None or isinstance(shape, DeviceMesh) or _is_shape(shape)
    if not right:
        raise OptionsError(
            f"The option device_mesh is {shape!r}. It takes (replicas, shards), (shards,) or a DeviceMesh."
        )
    if shard_size is not None and shard_size != "node" and not _is_count(shard_size):
        raise OptionsError(
            f"The option shard_size is {shard_size!r}. It takes a number of processes, from 1, or 'node'."
        )


def shape_for(
    shape: MeshShape, shard_size: int | Literal["node"] | None, world_size: int, per_node: int
) -> tuple[int, ...]:
    """How many replicas there are, if more than one, and into how many shards each is divided. The shape wins.

    Raises:
        OptionsError: Together they do not make the number of processes.
    """
    if isinstance(shape, DeviceMesh):
        wanted = tuple(shape.mesh.shape)
    elif shape is not None:
        wanted = tuple(shape)
    elif shard_size is not None:
        shards = per_node if shard_size == "node" else shard_size
        wanted = (world_size // shards, shards)
    else:
        wanted = (world_size,)
    if math.prod(wanted) != world_size:
        names = (REPLICATE, SHARD)[-len(wanted) :]
        product = " * ".join(f"{name}({size})" for name, size in zip(names, wanted, strict=True))
        raise OptionsError(
            f"{product} != WORLD_SIZE({world_size}): a model cannot be sharded like that over {world_size} "
            f"process(es). Set shard_size to a divisor of {world_size}, or ask for other devices."
        )
    return wanted


def mesh_of(shape: tuple[int, ...], device: torch.device) -> DeviceMesh:
    """The mesh. Called on every rank."""
    replicas = shape[0] if len(shape) == 2 else 1
    sizes = {SHARD: shape[-1]} if replicas == 1 else {REPLICATE: replicas, SHARD: shape[-1]}
    return make_mesh(device, sizes)


def forget_groups(mesh: DeviceMesh) -> None:
    """Let go of the process groups of a mesh, which tensors on it keep alive. Called when they are destroyed."""
    registry: dict[str, Any] = getattr(mesh, "_pg_registry", {})  # since torch 2.12
    registry.clear()


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple | list) and 1 <= len(value) <= 2 and all(map(_is_count, value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
