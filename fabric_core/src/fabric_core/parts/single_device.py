"""One process on one device: the base strategy as it is."""

from __future__ import annotations

from fabric_core.contracts.strategy import Strategy
from fabric_core.hooks import SINGLE_DEVICE


class SingleDeviceStrategy(Strategy):
    """One process on one device."""

    spec = SINGLE_DEVICE
