"""One process on one device: the base strategy as it is."""

from __future__ import annotations

from fabric_core.contracts.strategy import Strategy


class SingleDeviceStrategy(Strategy):
    """One process on one device."""
