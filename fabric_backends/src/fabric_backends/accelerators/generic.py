"""Any device that PyTorch itself knows, through ``torch.accelerator``."""

from __future__ import annotations

import torch

from fabric_backends.accelerators.current import current_type
from fabric_backends.hooks import TORCH_ACCELERATOR
from fabric_core.contracts.accelerator import Accelerator
from fabric_core.errors import DevicesError

_BOUND = ("cuda",)  # the devices to which PyTorch 2.6 can bind a process group; it refuses all others


class TorchAccelerator(Accelerator):
    """The accelerator of the installed PyTorch; it can have one.

    Args:
        device_type: What it has to be (``"xpu"``); by default, whatever PyTorch has.

    Raises:
        DevicesError: PyTorch has another one, or none.
    """

    spec = TORCH_ACCELERATOR

    def __init__(self, device_type: str | None = None) -> None:
        current = current_type()
        self.device_type = device_type or current
        if current is None or self.device_type != current:
            raise DevicesError(
                f"A device of the type {device_type or 'torch.accelerator'!r} was asked for, but the accelerator of "
                f"the installed PyTorch is {current!r}. Install a PyTorch for that device, or use accelerator='auto'."
            )
        self.process_group_backend = _default_backend(current)
        self.binds_process_group = current in _BOUND

    def device(self, index: int) -> torch.device:
        """The device of that index."""
        return torch.device(str(self.device_type), index)

    def setup_device(self, device: torch.device) -> None:
        """Make it the current device."""
        torch.accelerator.set_device_index(device.index)


def _default_backend(device_type: str) -> str | None:
    """The ``torch.distributed`` backend that is registered for a device type, if one is."""
    if not torch.distributed.is_available():
        return None
    return torch.distributed.Backend.default_device_backend_map.get(device_type)
