"""The GPU of an Apple computer."""

from __future__ import annotations

import torch

from fabric_backends.hooks import MPS
from fabric_core.contracts.accelerator import Accelerator


class MPSAccelerator(Accelerator):
    """Metal Performance Shaders: one GPU, shared by all, and no collectives between processes."""

    spec = MPS

    def device(self, index: int) -> torch.device:
        """The only one."""
        return torch.device("mps", index)
