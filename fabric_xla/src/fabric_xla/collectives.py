"""Collectives between the processes of torch_xla, each of which has one device.

They are part of what is computed: every process has to call the same ones in the same order. ``group`` is, as in
torch_xla, a list of lists of ranks that are together; ``None`` means all.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch_xla.runtime as xr
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch_xla.core import xla_model as xm

from fabric_core.contracts.strategy import ReduceOp
from fabric_core.errors import ConfigurationError, SetupError, WrongTypeError, did_you_mean, listing
from fabric_xla.pending import compute, same_random_numbers

Groups = Any

_OPS = {
    "mean": xm.REDUCE_SUM,
    "sum": xm.REDUCE_SUM,
    "min": xm.REDUCE_MIN,
    "max": xm.REDUCE_MAX,
    "product": xm.REDUCE_MUL,
}
# The sum of truths is true when one of them is, as everywhere in PyTorch.
_OF_TRUTH = {xm.REDUCE_SUM: xm.REDUCE_MAX, xm.REDUCE_MUL: xm.REDUCE_MIN}
_HALVES = {torch.float16, torch.bfloat16}


def average_(tensors: list[Tensor]) -> None:
    """Replace tensors by their means over all processes, in place and in one computation."""
    if tensors:
        xm.all_reduce(xm.REDUCE_SUM, tensors, scale=1.0 / xr.world_size())


@torch.no_grad()
def broadcast_(tensors: list[Tensor], src: int = 0) -> None:
    """Replace tensors by those of process ``src``, in place and in one computation.

    What the others have does not matter, NaN or not. Every process computes the same: whether it is ``src`` is a number
    that is sent to the device. (One in a tensor without dimensions would be made a part of what is computed.)
    """
    is_source = torch.tensor([xr.global_ordinal() == src])
    sent = []
    for tensor in tensors:
        own = tensor.to(torch.uint8) if tensor.dtype is torch.bool else tensor
        sent.append(torch.where(is_source.to(tensor.device), own, torch.zeros_like(own)))
    if sent:
        xm.all_reduce(xm.REDUCE_SUM, sent)
    for tensor, received in zip(tensors, sent, strict=True):
        tensor.copy_(received.reshape(tensor.shape))


def all_reduce(tensor: Tensor, op: ReduceOp = "mean", group: Groups = None) -> Tensor:
    """Combine a tensor of the same shape and dtype from every process. Called on each of them.

    Returns:
        The same shape and dtype, detached. Means of 16-bit numbers are computed in 32 bits.

    Raises:
        ConfigurationError: There is no such ``op``.
    """
    if op not in _OPS:
        raise ConfigurationError(
            f"There is no reduction {op!r}.{did_you_mean(op, _OPS)} There are: {listing(_OPS)}."
        )
    dtype, kind = tensor.dtype, _OPS[op]
    sent = tensor.detach()
    if dtype is torch.bool:
        sent, kind = sent.to(torch.uint8), _OF_TRUTH.get(kind, kind)
    elif op == "mean" and dtype in _HALVES:
        sent = sent.float()
    scale = 1.0 / size_of(group) if op == "mean" else 1.0
    result: Tensor = xm.all_reduce(kind, sent, scale=scale, groups=group)
    return result.to(dtype)


def all_gather(tensor: Tensor, group: Groups = None) -> Tensor:
    r"""Collect a tensor of the same shape S from every process.

    Returns:
        Shape (processes, \*S), detached.
    """
    sent = tensor.detach().to(torch.uint8) if tensor.dtype is torch.bool else tensor.detach()
    gathered: Tensor = xm.all_gather(sent.unsqueeze(0), dim=0, groups=group, pin_layout=False)
    return gathered.to(tensor.dtype)


class _AllGather(torch.autograd.Function):
    """`all_gather` through which gradients flow back: each process gets the sum of what all make of its part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Groups) -> Tensor:
        ctx.group = group
        return all_gather(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = next(group.index(xr.global_ordinal()) for group in _groups(ctx.group) if _is_in(group))
        return all_reduce(gradient, "sum", ctx.group)[own], None


def all_gather_with_gradient(tensor: Tensor, group: Groups = None) -> Tensor:
    """As `all_gather`, part of the graph. If one process goes backward through it, all have to."""
    gathered: Tensor = _AllGather.apply(tensor, group)  # type: ignore[no-untyped-call]
    return gathered


def size_of(group: Groups) -> int:
    """How many processes are together."""
    return next(len(ranks) for ranks in _groups(group) if _is_in(ranks))


def _groups(group: Groups) -> Sequence[list[int]]:
    return group or [list(range(xr.world_size()))]


def _is_in(ranks: Sequence[int]) -> bool:
    return xr.global_ordinal() in ranks


def exchange(what: str, payload: bytes) -> list[bytes]:
    """Give bytes to every process, and get those of each, in the order of ranks. Called on every process."""
    with same_random_numbers():
        return list(xm.rendezvous(f"fabric.{what}", payload))


def barrier(name: str | None) -> None:
    """Wait until every process is here and has computed what was pending, and make sure that all mean the same.

    Raises:
        SetupError: The processes gave different names.
    """
    names = [text.decode() for text in exchange("barrier", (name or "").encode())]
    if len(set(names)) > 1:
        waiting = ", ".join(f"rank {rank} at {each!r}" for rank, each in enumerate(names))
        raise SetupError(
            f"The ranks wait at different barriers: {waiting}. Every rank has to come to the same barriers in the same "
            "order; look for one inside an 'if' that only some ranks enter."
        )
    xm.wait_device_ops()


def broadcast_object(obj: Any, src: int) -> Any:
    """Send an object from rank ``src``. Called on every process; what the others pass is ignored.

    Returns:
        The object of rank ``src``. Tensors that were on its device are on the device of each.

    Raises:
        WrongTypeError: The object cannot be pickled; on every process.
    """
    payload = _packed(obj) if xr.global_ordinal() == src else b""
    sent = exchange("broadcast", payload)[src]
    if sent[:1] == _UNSENT:
        raise WrongTypeError(f"broadcast cannot send the object of rank {src}: {sent[1:].decode()}")
    return torch.load(io.BytesIO(sent[1:]), weights_only=False)


_SENT, _UNSENT = b"+", b"-"


def _packed(obj: Any) -> bytes:
    compute()
    buffer = io.BytesIO()
    try:
        torch.save(obj, buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        return _UNSENT + f"it does not pickle ({type(error).__name__}: {error}).".encode()
    return _SENT + buffer.getvalue()
