"""What has to be alike on ranks that hold parts of one model: batches, random numbers, gradients of undivided weights.

Each computes with a part of the weights on what it believes to be the input of all. If the inputs differ, nothing
fails, and nothing is learnt.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fabric_backends import collectives
from fabric_core.data.collections import map_tensors
from fabric_core.errors import SetupError, listing

_ROUNDING = 0.03
"""By which part of its norm a gradient may differ between ranks that compute it in the same way, even in bfloat16."""


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


def check_gradients(gradients: Mapping[str, Tensor], group: dist.ProcessGroup, device: torch.device) -> bool:
    """Compare the gradients of weights of which each rank of a group has all. Called on each of its ranks.

    Args:
        gradients: By name, plain, the same names on every rank.
        group, device: Who compares, and where.

    Returns:
        Whether they could be compared: that is, whether all are finite.

    Raises:
        SetupError: Some differ by more than rounding can explain; on each rank.
    """
    if not gradients:
        return True
    marks = torch.stack([_mark(gradient.to(device)) for gradient in gradients.values()])  # (gradients, 2)
    everyone = collectives.all_gather(marks, group)  # (ranks, gradients, 2)
    if not everyone.isfinite().all():
        return False
    differences = (everyone - everyone[0]).abs().amax(dim=(0, 2)) > _ROUNDING * everyone[..., 0].amax(dim=0)
    wrong = [name for name, differs in zip(gradients, differences.tolist(), strict=True) if differs]
    if not wrong:
        return True
    raise SetupError(
        f"The ranks {_ranks_of(group)} hold parts of one model and all of {listing(map(repr, wrong))}, of which they "
        "have computed different gradients. Such a weight works on a part of each sequence, or of the rows, so its "
        "gradients have to be summed: put its layer into the plan that parallelizes the model (SequenceParallel() for "
        "a norm)."
    )


def _mark(gradient: Tensor) -> Tensor:
    """The norm of a gradient, and how far it reaches in some direction: two numbers that tell gradients apart."""
    values = gradient.detach().flatten().float()
    direction = torch.arange(values.numel(), device=values.device, dtype=torch.float32).sin_()
    return torch.stack([values.norm(), values @ direction])


def _ranks_of(group: dist.ProcessGroup) -> str:
    return ", ".join(map(str, dist.get_process_group_ranks(group)))


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
    raise SetupError(
        f"The ranks {_ranks_of(group)} hold parts of one model, so they have to read the same batches, but "
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
