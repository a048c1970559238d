"""The options of the precision: read before PyTorch is, so nothing here imports it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Options:
    """What ``precision_options`` takes.

    Attributes:
        format: e4m3 has 3 bits of mantissa and ends at 448; e5m2 has 2, and ends at 57344.
        stochastic: Round up or down at random, so that the mean is the number itself; else to the nearest.
    """

    format: Literal["e4m3", "e5m2"] = "e4m3"
    stochastic: bool = False
