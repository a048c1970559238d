"""Finding the devices. Every command asks, so nothing here imports PyTorch."""

import os

from fabric_core import ConfigurationError
from fabric_core.specs import Inventory


def probe() -> Inventory:
    """As many devices as CPUACCEL_DEVICES says: none without it, so that this takes no machine by surprise."""
    text = os.environ.get("CPUACCEL_DEVICES", "0")
    if not (text.isascii() and text.isdigit()):
        raise ConfigurationError(
            f"CPUACCEL_DEVICES has to be a number of devices, such as 2, and is {text!r}."
        )
    return Inventory(tuple(range(int(text))), note=f"CPUACCEL_DEVICES={text}")
