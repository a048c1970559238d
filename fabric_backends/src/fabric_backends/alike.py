"""What has to be alike on ranks that hold parts of one model: batches, and the random numbers of dropout.

Each computes with a part of the weights on what it believes to be the input of all. If the inputs differ, nothing
fails, and nothing is learnt.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fabric_backends import collectives
from fabric_core.data.collections import map_tensors
from fabric_core.errors import SetupError


def share_random_state(group: collectives.Group, device: torch.device) -> None:
    """Go on with the random numbers of the first rank of a group. Called on each of its ranks.

    Args:
        group: Whose.
        device: Whose generator is shared besides that of the CPU.
    """
    torch.set_rng_state(_from_first(torch.get_rng_state(), group, device))
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.set_rng_state(_from_first(module.get_rng_state(device), group, device), device)


@contextmanager
def same_random_numbers(group: collectives.Group, device: torch.device) -> Iterator[None]:
    """A context in which all ranks of a group draw the same random numbers; afterwards each goes on with its own."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=_other_than_cpu(device)):
        share_random_state(group, device)
        yield


def check_alike(batches: Iterator[Any], group: dist.ProcessGroup, device: torch.device) -> Iterator[Any]:
    """The batches of one loop, of which the first is compared between the ranks of a group.

    Raises:
        SetupError: They differ; on each of its ranks.
    """
    for first in batches:
        _compare(first, group, device)
        yield first
        break
    yield from batches


def _other_than_cpu(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type  # whose generator is forked besides, if any


def _from_first(state: Tensor, group: collectives.Group, device: torch.device) -> Tensor:
    carried = state.to(device)
    dist.broadcast(carried, group=group, group_src=0)
    return carried.cpu()


def _compare(batch: Any, group: dist.ProcessGroup, device: torch.device) -> None:
    mark = torch.tensor(_digest(batch), device=device)
    if len(set(collectives.all_gather(mark, group).tolist())) == 1:
        return
    ranks = dist.get_process_group_ranks(group)
    raise SetupError(
        f"The ranks {', '.join(map(str, ranks))} hold parts of one model, so they have to read the same batches, but "
        "their first batches differ. Make the order of the data independent of the rank: pass the loader a generator "
        "with a fixed seed, call fabric.seed_everything(seed) before it is made, and let datasets not look at the rank."
    )


def _digest(batch: Any) -> int:
    """A number that tells batches of other tensors apart: other values, dtypes, shapes, or another order."""
    digest = hashlib.blake2b(digest_size=8)

    def add(tensor: Tensor) -> Tensor:
        digest.update(repr((tensor.dtype, tensor.shape)).encode())
        if tensor.layout is torch.strided:
            values = collectives.as_bytes(tensor).cpu()
            digest.update((ctypes.c_char * values.numel()).from_address(values.data_ptr()))
        return tensor

    map_tensors(add, batch)
    return int.from_bytes(digest.digest(), "big", signed=True)
