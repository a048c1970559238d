"""True precision: weights, inputs and computation all in one dtype other than float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from fabric_backends.hooks import TRUE
from fabric_backends.precisions.conversion import default_dtype, dtype_among, widen
from fabric_core.contracts.precision import Precision
from fabric_core.data.collections import convert_floats

_CONVERSIONS = {
    torch.float64: nn.Module.double,
    torch.float16: nn.Module.half,
    torch.bfloat16: nn.Module.bfloat16,
}


class TruePrecision(Precision):
    """Everything that is a floating-point number has one dtype; integers and complex numbers are left alone.

    Gradients and the optimizer's state have that dtype too. Losses are not scaled: in float16, gradients below 6e-8
    are lost; ``16-mixed`` keeps them. Outputs of a model come back in the default dtype (float32), except that
    float64 stays float64, because the digits are what it was asked for.

    Args:
        dtype: ``"float64"``, ``"float16"`` or ``"bfloat16"``, or the ``torch.dtype`` itself.

    Raises:
        OptionsError: Another dtype.
    """

    spec = TRUE

    def __init__(self, dtype: str | torch.dtype) -> None:
        self.dtype = dtype_among(dtype, _CONVERSIONS, "TruePrecision")

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert parameters and buffers, in place, so that an optimizer that has them already keeps them."""
        return _CONVERSIONS[self.dtype](module)

    def init_context(self) -> AbstractContextManager[Any]:
        """Make it the default dtype, so that new parameters and tensors are created in it."""
        return default_dtype(self.dtype)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Make it the default dtype, so that what a forward pass creates fits what it computes."""
        return default_dtype(self.dtype)

    def convert_input(self, data: Any) -> Any:
        """Convert the floating-point tensors among the arguments."""
        return convert_floats(data, self.dtype)

    def convert_output(self, data: Any) -> Any:
        """Bring outputs back to the default dtype, never to fewer digits."""
        return widen(data)
