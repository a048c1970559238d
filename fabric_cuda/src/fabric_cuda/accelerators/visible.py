"""The devices that this process sees: how many, and which. Nothing here starts to use one.

[Note: the order of devices] The index of a device depends on ``CUDA_DEVICE_ORDER``. CUDA's own order puts the fastest
device first and says nothing of the rest; the management library goes along the PCI bus. So that an index and a UUID
always mean the same card, and the same on every rank, the order of the bus is made the default
(`CUDAAccelerator`), as long as the devices are untouched and the user has not chosen.
"""

from __future__ import annotations

import functools
import os
import re

import torch

from fabric_cuda.accelerators.asking import ask
from fabric_cuda.accelerators.nvml import NVML, library

VISIBLE = "CUDA_VISIBLE_DEVICES"
HIDING = (VISIBLE, "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""The environment variables that hide devices, or give them other indices; the last two with ROCm only."""

ORDER = "CUDA_DEVICE_ORDER"
BUS_ORDER = "PCI_BUS_ID"

_LIST = """
import json, torch
cuda = torch.cuda
print(json.dumps([str(getattr(cuda.get_device_properties(i), "uuid", "")) for i in range(cuda.device_count())]))
"""


def uuids() -> tuple[str, ...]:
    """The UUID (``"GPU-…"``, ``"MIG-…"``) of each visible device, by index; empty texts where there is none.

    The management library is asked first. Where it is missing, or devices are divided (MIG), another process is, which
    takes as long as it takes to import PyTorch.

    Raises:
        RuntimeError: The other process failed.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return tuple(_prefixed(_uuid_of(index)) for index in range(torch.cuda.device_count()))
    if not torch.version.hip:
        nvml = library()
        found = None if nvml is None else _through_library(nvml)
        if found is not None:
            return found
    return _through_process(*map(os.environ.get, (*HIDING, ORDER)))


def _through_library(nvml: NVML) -> tuple[str, ...] | None:
    """``None`` when the library cannot tell."""
    present = nvml.uuids()
    found = _selected(present, os.environ.get(VISIBLE))
    if found is None or any(nvml.is_divided(uuid) for uuid in found):
        return None
    if os.environ.get(ORDER, BUS_ORDER) != BUS_ORDER and len({nvml.name(uuid) for uuid in present}) > 1:
        return None
    return found


def _selected(present: tuple[str, ...], value: str | None) -> tuple[str, ...] | None:
    """What ``CUDA_VISIBLE_DEVICES`` leaves, in its order; ``None`` when it speaks of divided devices.

    By the rules of the CUDA programming guide: what follows an entry that means no device is ignored, and one device
    that is named twice hides all.
    """
    if value is None:
        return present
    found: list[str] = []
    for entry in map(str.strip, value.split(",")):
        if entry.startswith("MIG-"):
            return None
        meant = _meant(entry, present)
        if meant is None:
            break
        if meant in found:
            return ()
        found.append(meant)
    return tuple(found)


def _meant(entry: str, present: tuple[str, ...]) -> str | None:
    if re.fullmatch(r"[0-9]+", entry):
        return present[int(entry)] if int(entry) < len(present) else None
    matches = [uuid for uuid in present if entry.startswith("GPU-") and uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


@functools.cache
def _through_process(*variables: str | None) -> tuple[str, ...]:
    """Asked once, as long as the variables stay."""
    return tuple(map(_prefixed, ask(_LIST)))


def _uuid_of(index: int) -> str:
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))


def _prefixed(uuid: str) -> str:
    """PyTorch leaves out the first word, which says whether it is a whole device."""
    if not uuid or uuid.startswith(("GPU-", "MIG-")):
        return uuid
    return ("MIG-" if "MIG-" in os.environ.get(VISIBLE, "") else "GPU-") + uuid
