"""What a device has to say of itself: PyTorch's own account of its memory, and the readings of the driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

import torch

from fabric_cuda.accelerators.nvml import NVML, NVMLError, library
from fabric_cuda.accelerators.visible import uuids

_MEMORY = {
    "allocated_bytes": "allocated_bytes.all.current",
    "reserved_bytes": "reserved_bytes.all.current",
    "peak_allocated_bytes": "allocated_bytes.all.peak",
    "peak_reserved_bytes": "reserved_bytes.all.peak",
}
"""What PyTorch calls it."""

_READINGS: Mapping[str, Callable[[NVML, str], float]] = {
    "free_bytes": NVML.free_memory,
    "total_bytes": NVML.total_memory,
    "compute_percent": lambda nvml, uuid: nvml.load(uuid).compute_percent,
    "memory_percent": lambda nvml, uuid: nvml.load(uuid).memory_percent,
    "temperature_celsius": NVML.temperature,
    "power_watts": NVML.power,
}


def device_stats(device: torch.device) -> dict[str, float]:
    """As `CUDAAccelerator.device_stats`."""
    memory = torch.cuda.memory_stats(device)
    stats: dict[str, float] = {name: memory.get(theirs, 0) for name, theirs in _MEMORY.items()}
    nvml = None if torch.version.hip else library()
    if nvml is not None:
        uuid = uuids()[torch.cuda.current_device() if device.index is None else device.index]
        for name, reading in _READINGS.items():
            with suppress(NVMLError):
                stats[name] = reading(nvml, uuid)
    return stats
