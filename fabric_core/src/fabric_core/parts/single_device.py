"""One process on one device: the base strategy as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fabric_core.contracts.strategy import Strategy
from fabric_core.hooks import SINGLE_DEVICE


class SingleDeviceStrategy(Strategy):
    """One process on one device."""

    spec = SINGLE_DEVICE

    def stage_checkpoint(
        self, checkpoint: Mapping[str, Any], copied: Callable[[Any], Any]
    ) -> Mapping[str, Any]:
        """Copy all of it: writing a file needs nobody else."""
        staged: Mapping[str, Any] = copied(checkpoint)
        return staged
