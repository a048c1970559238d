"""Collectives over collections: numbers become tensors, tensors go through the strategy one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast, get_args

import torch

from fabric_core.contracts.strategy import ReduceOp
from fabric_core.data.collections import map_tensors
from fabric_core.errors import ConfigurationError, did_you_mean, listing

if TYPE_CHECKING:
    from torch import Tensor

_OPS: dict[str, ReduceOp] = {name: name for name in get_args(ReduceOp)} | {"avg": "mean"}
_NUMBER_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


def each_tensor(data: Any, device: torch.device, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``change`` to every tensor and number of a collection, each on ``device``.

    Python numbers become 0-dimensional tensors that hold them exactly: int64, float64, bool, complex128.
    """
    return map_tensors(lambda tensor: change(tensor.to(device)), _numbers_as_tensors(data, device))


def reduce_op(name: str) -> ReduceOp:
    """The reduction of a name.

    Raises:
        ConfigurationError: There is none of that name.
    """
    op = _OPS.get(str(name).lower())
    if op is None:
        raise ConfigurationError(
            f"reduce_op={name!r} is not known.{did_you_mean(str(name), _OPS)} There are: {listing(_OPS)}."
        )
    return op


def averageable(tensor: Tensor, op: ReduceOp) -> Tensor:
    """The tensor in a dtype in which ``op`` is exact: means of whole numbers are taken in float64."""
    needs_float = op == "mean" and not (tensor.is_floating_point() or tensor.is_complex())
    return tensor.to(torch.float64) if needs_float else tensor


def _numbers_as_tensors(data: Any, device: torch.device) -> Any:
    kind: Any = type(data)
    if kind in _NUMBER_DTYPES:
        return torch.tensor(data, dtype=_NUMBER_DTYPES[kind], device=device)
    if kind is dict:
        return {key: _numbers_as_tensors(value, device) for key, value in data.items()}
    if kind in (list, tuple):
        return kind(_numbers_as_tensors(value, device) for value in data)
    return cast(Any, data)
