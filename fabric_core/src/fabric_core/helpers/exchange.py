"""Sending a few numbers to every rank exactly, whatever the device can compute with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fabric_core.fabric import Fabric


def gather_numbers(fabric: Fabric, numbers: Sequence[float]) -> list[list[float]]:
    """The numbers of every rank. Called on every rank, with equally many.

    They travel as the bits of a float64, because not every device has such a format. What is computed of them on the
    CPU, in the order of ranks, is then equal on every rank to the last bit.

    Returns:
        A list per rank, in the order of ranks.
    """
    bits = torch.tensor(list(numbers), dtype=torch.float64, device="cpu").view(torch.int64)
    gathered: torch.Tensor = fabric.all_gather(bits)
    rows: list[list[float]] = gathered.cpu().view(torch.float64).tolist()
    return rows
