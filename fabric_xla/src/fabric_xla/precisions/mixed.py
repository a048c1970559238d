"""Mixed precision: weights in float32, computation in bfloat16 where that is safe, by ``torch.autocast``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from fabric_core.contracts.precision import Precision
from fabric_xla.hooks import MIXED
from fabric_xla.precisions.conversion import widen


class XLAMixedPrecision(Precision):
    """Forward passes run under ``torch.autocast("xla")``; weights, gradients and the optimizer's state are float32.

    Outputs come back in the default dtype (float32). bfloat16 has the range of float32, so no loss is scaled.
    """

    spec = MIXED

    def forward_context(self) -> AbstractContextManager[Any]:
        """A fresh ``torch.autocast``. One object serves one use, so passes may be nested."""
        return torch.autocast("xla", dtype=torch.bfloat16)

    def convert_output(self, data: Any) -> Any:
        """Bring outputs in bfloat16 back to the default dtype."""
        return widen(data)
