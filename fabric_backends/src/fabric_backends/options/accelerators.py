"""Options of the accelerators."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceOptions:
    """Of ``torch_accelerator``, and of the devices that it drives.

    Attributes:
        device_type: What PyTorch calls the device. Without it, whichever PyTorch has.
    """

    device_type: str | None = None
