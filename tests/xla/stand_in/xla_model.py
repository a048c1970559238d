"""Collectives, by ``torch.distributed``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

REDUCE_SUM, REDUCE_MUL, REDUCE_MIN, REDUCE_MAX = "sum", "mul", "min", "max"

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mul": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}

averaged: list[int] = []
"""How many tensors each reduction in place was given."""


def all_reduce(
    kind: str, inputs: Any, scale: float = 1.0, groups: Any = None, pin_layout: bool = True
) -> Any:
    """A list is reduced in place; a tensor is not changed."""
    assert groups is None
    if isinstance(inputs, torch.Tensor):
        result = inputs.clone()
        dist.all_reduce(result, _OPS[kind])
        return result * scale if scale != 1.0 else result
    averaged.append(len(inputs))
    for tensor in inputs:
        dist.all_reduce(tensor, _OPS[kind])
        tensor.mul_(scale)
    return inputs


def all_gather(
    value: torch.Tensor, dim: int = 0, groups: Any = None, pin_layout: bool = True
) -> torch.Tensor:
    assert groups is None
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts, dim)


def rendezvous(tag: str, payload: bytes = b"") -> list[bytes]:
    payloads: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(payloads, (tag, payload))
    assert len({tag for tag, _ in payloads}) == 1, "torch_xla would hang"
    return [payload for _, payload in payloads]


def wait_device_ops() -> None:
    """Nothing is pending."""


def set_rng_state(seed: int, device: Any = None) -> None:
    """The device is the CPU, which is seeded anyway."""


def get_rng_state(device: Any = None) -> int:
    """Likewise."""
    return 0
