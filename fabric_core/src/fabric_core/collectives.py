"""Collectives over collections: numbers become tensors, tensors go through the strategy one by one."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

import torch

from fabric_core.contracts.strategy import ReduceOp
from fabric_core.data.collections import map_entries, map_tensors
from fabric_core.errors import ConfigurationError, did_you_mean, listing

if TYPE_CHECKING:
    from torch import Tensor

_OPS: dict[str, ReduceOp] = {name: name for name in get_args(ReduceOp)} | {"avg": "mean"}
_NUMBER_DTYPES = {
    bool: torch.bool,
    numbers.Integral: torch.int64,
    numbers.Real: torch.float64,
    numbers.Complex: torch.complex128,
}
_PYTHON_TYPE = {torch.bool: bool, torch.int64: int, torch.float64: float, torch.complex128: complex}


def each_tensor(data: Any, device: torch.device, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``change`` to every tensor and number of a collection, each on ``device``.

    Python numbers become 0-dimensional tensors that hold them exactly: int64, float64, bool, complex128.
    """
    if type(data) is torch.Tensor:
        return change(data if data.device == device else data.to(device))
    return map_tensors(lambda tensor: change(tensor.to(device)), _numbers_as_tensors(data, device))


def reduce_op(name: str) -> ReduceOp:
    """The reduction of a name.

    Raises:
        ConfigurationError: There is none of that name.
    """
    op = _OPS.get(name) or _OPS.get(str(name).lower())
    if op is None:
        raise ConfigurationError(
            f"reduce_op={name!r} is not known.{did_you_mean(str(name), _OPS)} There are: {listing(_OPS)}."
        )
    return op


def reducible(tensor: Tensor, op: ReduceOp) -> Tensor:
    """The tensor in a dtype in which ``op`` is exact: means of whole numbers in float64, counts of truths in int64."""
    if op == "mean" and not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.to(torch.float64)
    return tensor.to(torch.int64) if op in ("sum", "product") and tensor.dtype is torch.bool else tensor


def _numbers_as_tensors(data: Any, device: torch.device) -> Any:
    if isinstance(data, torch.Tensor | str | bytes):
        return data
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(data, numpy.generic | numpy.ndarray):
        return torch.as_tensor(data, device=device)
    for number, dtype in _NUMBER_DTYPES.items():
        if isinstance(data, number):
            return _exactly(data, dtype, device)
    return map_entries(lambda entry: _numbers_as_tensors(entry, device), data)


def _exactly(number: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        return torch.tensor(_PYTHON_TYPE[dtype](number), dtype=dtype, device=device)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"The number {number!r} does not fit into {dtype}. Send it as text, with broadcast()."
        ) from error
