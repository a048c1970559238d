"""The CPU as an accelerator: every process is a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric_core.contracts.accelerator import Accelerator
from fabric_core.hooks import CPU
from fabric_core.specs import Inventory

if TYPE_CHECKING:
    import torch


def probe() -> Inventory:
    """There is always a CPU, and it takes any number of processes; one unless told otherwise."""
    return Inventory(virtual=True, default=1, note="any number of processes")


class CPUAccelerator(Accelerator):
    """The CPU."""

    spec = CPU

    def device(self, index: int) -> torch.device:
        """The same device for every process."""
        import torch

        return torch.device("cpu")
