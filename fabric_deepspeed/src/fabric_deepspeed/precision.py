"""The number format of DeepSpeed's engine, which converts weights, scales losses and keeps float32 copies itself."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fabric_backends.precisions.conversion import default_dtype, dtype_among, widen
from fabric_core.contracts.precision import Precision
from fabric_core.data.collections import convert_floats
from fabric_deepspeed.hooks import PRECISION

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class DeepSpeedPrecision(Precision):
    """Inputs are converted to what the engine computes in, outputs back; the engine does the rest.

    In half precision, the engine's optimizer keeps the weights in float32, and rounds them anew after each step. A
    model that was made in float32 is trained from those weights, and not from their rounded copies. With float16 the
    engine scales the losses, and skips steps whose gradients are not finite.

    Args:
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``, or the ``torch.dtype`` itself.
        makes_half: Whether ``init_module`` makes models in this format, which takes half of the memory.

    Raises:
        OptionsError: Another dtype.
    """

    spec = PRECISION

    def __init__(self, dtype: str | torch.dtype = "float32", *, makes_half: bool = False) -> None:
        self.dtype = dtype_among(dtype, _DTYPES, "DeepSpeedPrecision")
        self.makes_half = makes_half
        self.scales_loss = self.dtype is torch.float16

    def init_context(self) -> AbstractContextManager[Any]:
        """New parameters and tensors are made in the format, where that was asked for."""
        return default_dtype(self.dtype) if self.makes_half else nullcontext()

    def convert_input(self, data: Any) -> Any:
        """Convert the floating-point tensors among the arguments to the format of the engine."""
        return convert_floats(data, self.dtype)

    def convert_output(self, data: Any) -> Any:
        """Bring outputs back to the default dtype, never to fewer digits."""
        return widen(data)
