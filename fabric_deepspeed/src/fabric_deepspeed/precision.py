"""The number formats of DeepSpeed: what the engine casts, seen from outside."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fabric_core.contracts.precision import Precision
from fabric_core.data.collections import convert_floats, map_tensors
from fabric_core.errors import OptionsError, listing
from fabric_deepspeed.hooks import PRECISION

if TYPE_CHECKING:
    from collections.abc import Iterator

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class DeepSpeedPrecision(Precision):
    """One dtype for computing; the engine keeps and updates the weights in float32 beside it.

    So both ``-mixed`` and ``-true`` have float32 master weights, as DeepSpeed always does. They differ in what a model
    is before the engine gets it: ``-true`` converts it, its buffers too, and `init_context` creates it in that dtype
    from the start; ``-mixed`` starts from float32 weights, and buffers stay in float32.

    With float16 the engine scales the losses itself, and skips steps with gradients that are not finite.

    Args:
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        from_the_start: Whether a model is converted, and created, in that dtype.
    """

    spec = PRECISION

    def __init__(self, dtype: str | torch.dtype, from_the_start: bool = False) -> None:
        name = str(dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise OptionsError(f"DeepSpeedPrecision cannot use dtype={dtype!r}. It takes {listing(_DTYPES)}.")
        self.dtype = _DTYPES[name]
        self.from_the_start = from_the_start
        self.scales_loss = self.dtype is torch.float16  # by the engine, in its own backward pass

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the weights and buffers where that is asked for; the engine converts what is left."""
        return module.to(self.dtype) if self.from_the_start else module

    def init_context(self) -> AbstractContextManager[Any]:
        """Create new parameters and tensors in the dtype of the weights."""
        return _default_dtype(self.dtype if self.from_the_start else torch.get_default_dtype())

    def convert_input(self, data: Any) -> Any:
        """Convert the floating-point tensors among the arguments of a forward pass."""
        return convert_floats(data, self.dtype)

    def convert_output(self, data: Any) -> Any:
        """Bring outputs in half precision back to the default dtype, so that losses are computed in it."""
        return map_tensors(_widen, data)


def _widen(tensor: Tensor) -> Tensor:
    default = torch.get_default_dtype()
    if tensor.dtype is default or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, default))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
