"""Data parallel in one process: the model is copied to every device for each forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from fabric_backends.hooks import DP
from fabric_core.contracts.precision import Precision
from fabric_core.contracts.strategy import Strategy


class DataParallelStrategy(Strategy):
    """PyTorch's ``DataParallel``: one process, whose threads compute a part of each batch on each device.

    It is the simplest way to several devices, and the slowest: the model is copied in every step. There is one process,
    so data are not split, and collectives have nothing to do. On the CPU there is one device in the end, and one copy.
    """

    spec = DP

    def connect(self) -> None:
        """Make the first device current. Called once."""
        super().connect()
        if self.root_device.type == "cpu":
            warnings.warn(
                "The strategy 'dp' copies a model to accelerators, and here is none. The CPU is one device, and "
                "computes each batch as a whole, without copies. To use its cores, start processes: strategy='ddp'.",
                UserWarning,
                stacklevel=2,
            )

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Spread forward passes over the devices. Called once per model.

        Returns:
            A ``DataParallel``; the module itself where there is one device only.
        """
        devices = self.surroundings.devices
        if self.root_device.type == "cpu" or len(devices) == 1:
            return module
        return nn.DataParallel(_InPrecision(module, self.surroundings.precision), list(devices), devices[0])

    def hold_gradient_sync(self, module: nn.Module) -> AbstractContextManager[Any] | None:
        """Nothing can be held back: the gradients of all devices meet in the backward pass."""
        return None

    def stage_checkpoint(
        self, checkpoint: Mapping[str, Any], copied: Callable[[Any], Any]
    ) -> Mapping[str, Any]:
        """Copy all of it: writing a file needs nobody else."""
        staged: Mapping[str, Any] = copied(checkpoint)
        return staged


class _InPrecision(nn.Module):
    """Computes in the context of the precision also in the threads of ``DataParallel``.

    These learn whether there is an autocast, but not of its dtype.
    """

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.module = module
        self._precision = precision

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._precision.forward_context():
            return self.module(*args, **kwargs)
