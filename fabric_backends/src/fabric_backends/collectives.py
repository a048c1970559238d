"""Collectives over a process group, as every strategy with a process per device has them.

Where values are only carried and not combined, tensors travel as bytes, so that every dtype may; the usual ones travel
as they are. Nothing waits for
other ranks longer than its result needs.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fabric_core.contracts.strategy import ReduceOp
from fabric_core.errors import ConfigurationError, SetupError, did_you_mean, listing

Group = Any
"""``torch.distributed.ProcessGroup``, or ``None`` for all ranks."""

_OPS = {
    "mean": dist.ReduceOp.SUM,
    "sum": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "product": dist.ReduceOp.PRODUCT,
}
# What no backend reduces, in a dtype that holds its values and wraps around as it does.
_STAND_INS = {
    torch.bool: torch.uint8,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
}
# The sum of some is true when one of them is, as everywhere in PyTorch.
_OF_TRUTH = {"sum": "max", "product": "min"}
# Every backend carries these; the rest of the dtypes go as bytes.
_CARRIED_AS_THEY_ARE = {torch.float32, torch.float64, torch.int32, torch.int64}
_HALVES = {torch.float16, torch.bfloat16}

_gather = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)  # its name before torch 2.13


def all_reduce(tensor: Tensor, op: ReduceOp = "mean", group: Group = None) -> Tensor:
    """Combine a tensor of the same shape and dtype from every rank of ``group``. Called on each of them.

    Args:
        tensor: Any shape; it is not changed.
        op: How. Means of 16-bit numbers are computed in 32 bits.
        group: All ranks by default.

    Returns:
        The same shape and dtype, detached, equal on every rank.

    Raises:
        ConfigurationError: There is no such ``op``.
    """
    if op not in _OPS:
        raise ConfigurationError(
            f"There is no reduction {op!r}.{did_you_mean(op, _OPS)} There are: {listing(_OPS)}."
        )
    if op == "product" and tensor.is_complex():
        return all_gather(tensor.detach(), group).prod(0)
    dtype, total = _in_transit(tensor, op)
    dist.all_reduce(total, _OPS[_OF_TRUTH.get(op, op) if dtype is torch.bool else op], group)
    if op == "mean":
        total /= _size(group)
    return total if total.dtype is dtype else total.to(dtype)


def _in_transit(tensor: Tensor, op: str) -> tuple[torch.dtype, Tensor]:
    """The dtype of the result, and a copy of the tensor that backends can reduce."""
    dtype = tensor.dtype
    if tensor.requires_grad:
        tensor = tensor.detach()
    stand_in = torch.float32 if op == "mean" and dtype in _HALVES else _STAND_INS.get(dtype, dtype)
    if stand_in is dtype:
        return dtype, tensor.clone(memory_format=torch.contiguous_format)
    return dtype, tensor.to(stand_in, memory_format=torch.contiguous_format)


def all_gather(tensor: Tensor, group: Group = None) -> Tensor:
    r"""Collect a tensor of the same shape S and dtype from every rank of ``group``. Called on each of them.

    Returns:
        Shape (ranks, \*S), detached, equal on every rank.
    """
    ranks = _size(group)
    if tensor.numel() == 0:
        return tensor.new_empty((ranks, *tensor.shape))
    if tensor.dtype in _CARRIED_AS_THEY_ARE and not tensor.is_neg():
        mine = (tensor.detach() if tensor.requires_grad else tensor).contiguous()
        mine = mine if mine.dim() == 1 else mine.view(-1)
    else:
        mine = as_bytes(tensor)
    everyone = mine.new_empty(ranks * mine.numel())
    _gather(everyone, mine, group)
    return (everyone if mine.dtype is tensor.dtype else everyone.view(tensor.dtype)).view(
        ranks, *tensor.shape
    )


def _size(group: Group) -> int:
    """How many ranks a group has."""
    return dist.get_world_size(group) if group is not None else dist.group.WORLD.size()  # type: ignore[union-attr]


class _AllGather(torch.autograd.Function):
    """`all_gather` through which gradients flow back: every rank gets the sum of what all ranks make of its part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, "sum", ctx.group)[dist.get_rank(ctx.group)], None


def all_gather_with_gradient(tensor: Tensor, group: Group = None) -> Tensor:
    """As `all_gather`, part of the graph. If one rank goes backward through it, all ranks have to."""
    gathered: Tensor = _AllGather.apply(tensor, group)  # type: ignore[no-untyped-call]
    return gathered


def broadcast_(tensor: Tensor, src: int = 0) -> None:
    """Overwrite a tensor on every rank with that of rank ``src``. Called on every rank, with the same shape."""
    carried = as_bytes(tensor)
    if carried.numel() == 0:
        return
    dist.broadcast(carried, src)
    if dist.get_rank() != src and carried.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(carried.view(tensor.dtype).reshape(tensor.shape))


def as_bytes(tensor: Tensor) -> Tensor:
    """The values of a tensor as one row of uint8; shares their memory where they lie in one piece."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def barrier(name: str | None, device: torch.device) -> None:
    """Wait until every rank is here, and make sure that all mean the same barrier. Called on every rank.

    Raises:
        SetupError: The ranks gave different names.
    """
    mark = _mark_of(name)
    marks = torch.tensor([mark, -mark], device=device)
    dist.all_reduce(marks, dist.ReduceOp.MAX)  # the largest, and the smallest
    if marks.tolist() == [mark, -mark]:
        return
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, name)
    waiting = ", ".join(
        f"rank {rank} at {'an unnamed one' if n is None else repr(n)}" for rank, n in enumerate(names)
    )
    raise SetupError(
        f"The ranks wait at different barriers: {waiting}. Every rank has to come to the same barriers in the same "
        "order; look for one inside an 'if' that only some ranks enter."
    )


@functools.lru_cache(maxsize=64)
def _mark_of(name: str | None) -> int:
    """A number for a name, the same on every rank; its negative fits into 64 bits, too."""
    return int.from_bytes(hashlib.blake2b((name or "").encode(), digest_size=7).digest(), "big")
