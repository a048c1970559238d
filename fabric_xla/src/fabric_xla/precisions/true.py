"""True half precision: weights, inputs and computation all in one 16-bit dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from fabric_core.contracts.precision import Precision
from fabric_core.data.collections import convert_floats
from fabric_core.errors import OptionsError, listing
from fabric_xla.hooks import TRUE
from fabric_xla.precisions.conversion import widen

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class XLATruePrecision(Precision):
    """Everything that is a floating-point number has 16 bits, gradients and the optimizer's state included.

    The weights are converted: environment variables that once let the compiler do so are gone from torch_xla. Outputs
    come back in the default dtype (float32). Losses are not scaled.

    Args:
        dtype: ``"bfloat16"``, which TPUs compute with, or ``"float16"``, which they emulate.

    Raises:
        OptionsError: Another dtype.
    """

    spec = TRUE

    def __init__(self, dtype: str) -> None:
        if dtype not in DTYPES:
            raise OptionsError(f"XLATruePrecision cannot use dtype={dtype!r}. It takes {listing(DTYPES)}.")
        self.dtype = DTYPES[dtype]

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert parameters and buffers, in place, so that an optimizer that has them already keeps them."""
        return module.to(self.dtype)

    def init_context(self) -> AbstractContextManager[Any]:
        """Make it the default dtype, so that new parameters and tensors are created in it."""
        return _default_dtype(self.dtype)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Make it the default dtype, so that what a forward pass creates fits what it computes."""
        return _default_dtype(self.dtype)

    def convert_input(self, data: Any) -> Any:
        """Convert the floating-point tensors among the arguments."""
        return convert_floats(data, self.dtype)

    def convert_output(self, data: Any) -> Any:
        """Bring outputs back to the default dtype."""
        return widen(data)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
