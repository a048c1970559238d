"""Device meshes: the processes of a job as a grid, whose axes have names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fabric_core.errors import OptionsError

DATA = "data_parallel"
TENSOR = "tensor_parallel"
CONTEXT = "context_parallel"

Size = int | Literal["auto"]


def axis_sizes(asked: Mapping[str, Size], world_size: int, num_nodes: int) -> dict[str, int]:
    """How many processes lie along each axis of a mesh.

    Args:
        asked: For each axis its size. One ``"auto"`` takes what the others leave. Of several, the data axis gets the
            number of nodes, so that the ranks of one model share a node, and the next one the rest.
        world_size: How many processes there are in all.
        num_nodes: On how many nodes.

    Raises:
        OptionsError: A size is none, or together they do not make the number of processes.
    """
    sizes = {axis: _checked(axis, size) for axis, size in asked.items()}
    open_axes = [axis for axis, size in sizes.items() if size is None]
    if len(open_axes) > 1 and DATA in open_axes:
        sizes[DATA] = num_nodes
        open_axes.remove(DATA)
    for axis in open_axes:
        sizes[axis] = max(1, world_size // math.prod(size for size in sizes.values() if size is not None))
    known = {axis: size or 1 for axis, size in sizes.items()}
    if math.prod(known.values()) != world_size:
        product = " * ".join(f"{axis}({size})" for axis, size in known.items())
        raise OptionsError(
            f"{product} != WORLD_SIZE({world_size}): the sizes of the axes do not make the number of processes. Set "
            f"{' and '.join(f'{axis}_size' for axis in known)} so that their product is {world_size} (one of them may "
            "be 'auto'), or ask for other devices."
        )
    return known


def make_mesh(device: torch.device, sizes: Mapping[str, int]) -> DeviceMesh:
    """The mesh over all ranks; neighbours lie along the last axis. Called on every rank."""
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    if sum(size > 1 for size in sizes.values()) > 1:
        mesh._flatten()  # PyTorch finds it, and reduces over all axes in one go
    return mesh


def _checked(axis: str, size: Size) -> int | None:
    if size == "auto":
        return None
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    raise OptionsError(f"The option {axis}_size is {size!r}. It takes a whole number from 1, or 'auto'.")
