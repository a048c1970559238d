"""Plain float32, with a say in how a TPU multiplies it."""

from __future__ import annotations

import torch

from fabric_core.contracts.precision import Precision
from fabric_core.errors import OptionsError, did_you_mean, listing
from fabric_xla.hooks import FULL

MATMULS = ("default", "high", "highest")


class XLAFullPrecision(Precision):
    """32-bit floating point everywhere, nothing converted.

    A TPU multiplies bfloat16. It makes a product of float32 matrices out of one (``"default"``), three (``"high"``) or
    six (``"highest"``) of those, and only the last has the digits of float32. It holds for the whole process.

    Args:
        matmul: One of these; ``None`` leaves torch_xla's own choice, which is ``"default"``.

    Raises:
        OptionsError: It is none of them.
    """

    spec = FULL

    def __init__(self, matmul: str | None = None) -> None:
        if matmul is not None and matmul not in MATMULS:
            raise OptionsError(
                f"XLAFullPrecision has no matmul={matmul!r}.{did_you_mean(str(matmul), MATMULS)} "
                f"It takes {listing(MATMULS)}."
            )
        self.matmul = matmul

    def attach(self, device: torch.device) -> None:
        """Tell torch_xla how to multiply, before anything is compiled."""
        super().attach(device)
        if self.matmul is not None:
            from torch_xla import backends

            if backends.get_mat_mul_precision() != self.matmul:  # it warns of being set again
                backends.set_mat_mul_precision(self.matmul)
