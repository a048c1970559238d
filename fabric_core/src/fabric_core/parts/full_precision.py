"""Plain float32: the base precision as it is."""

from __future__ import annotations

from fabric_core.contracts.precision import Precision
from fabric_core.hooks import FULL_PRECISION


class FullPrecision(Precision):
    """32-bit floating point everywhere, nothing converted."""

    spec = FULL_PRECISION
