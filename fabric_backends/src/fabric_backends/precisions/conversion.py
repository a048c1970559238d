"""What the precisions share: dtypes by name, and outputs on their way back to the user's loss."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fabric_core.data.collections import map_tensors
from fabric_core.errors import OptionsError, did_you_mean, listing


def dtype_among(dtype: Any, allowed: Iterable[torch.dtype], owner: str) -> torch.dtype:
    """The dtype that an option asks for.

    Args:
        dtype: A dtype, or its name (``"float16"``).
        allowed: The dtypes that ``owner`` can work with.
        owner: Whose option it is, for the message.

    Raises:
        OptionsError: It is none of them.
    """
    names = {str(one).removeprefix("torch."): one for one in allowed}
    name = str(dtype).removeprefix("torch.")
    if name not in names:
        raise OptionsError(
            f"{owner} cannot use dtype={dtype!r}.{did_you_mean(name, names)} It takes {listing(names)}."
        )
    return names[name]


def widen(data: Any) -> Any:
    """Bring the floating-point tensors of an output to the default dtype, unless that would lose digits.

    So losses are computed in float32 though a model answers in half precision, and stay in float64 when a model
    answers in that, as they do in plain PyTorch.
    """
    return _widened(data) if type(data) is Tensor else map_tensors(_widened, data)


def _widened(tensor: Tensor) -> Tensor:
    default = torch.get_default_dtype()
    if tensor.dtype is default or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, default))


class default_dtype(AbstractContextManager[None]):  # noqa: N801  (used like a function)
    """A context in which new floating-point tensors have a dtype. One object per use, so that uses may be nested."""

    __slots__ = ("_before", "_dtype")

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *exc_info: object) -> None:
        torch.set_default_dtype(self._before)
