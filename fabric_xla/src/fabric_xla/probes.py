"""What there is, without asking torch_xla: importing it is slow, chooses a device and takes hold of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from fabric_core import Detection, Inventory

PJRT_DEVICE = "PJRT_DEVICE"
LOCAL_RANK = "PJRT_LOCAL_PROCESS_RANK"
LOCAL_COUNT = "PJRT_LOCAL_PROCESS_COUNT"

PCI_DEVICES = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"
TPU_CHIPS = {"0x0027": 2, "0x005e": 1, "0x0056": 1, "0x0062": 1, "0x0063": 1, "0x006f": 1, "0x0076": 2}
"""The numbers by which TPUs call themselves on the PCI bus, and how many devices a chip of each is."""


def devices() -> Inventory:
    """The devices that torch_xla would compute on: the kind that ``PJRT_DEVICE`` names, else TPUs."""
    kind = os.environ.get(PJRT_DEVICE, "").upper()
    if kind == "CPU":
        return _on_cpu()
    if kind not in ("", "TPU"):
        return Inventory(note=f"{PJRT_DEVICE}={kind}, and TPU and CPU are what is supported")
    found = sum(_devices_of(folder) for folder in PCI_DEVICES.glob("*"))
    if not found and kind == "TPU":
        return Inventory(note=f"{PJRT_DEVICE}=TPU, but this machine has no TPU")
    note = f"{found} TPU device(s)" if found else f"this machine has no TPU, and {PJRT_DEVICE} is not set"
    return Inventory(tuple(range(found)), note=note)


def devices_per_process() -> int:
    """How many devices a process that torch_xla starts would drive, in a thread each: those of one chip."""
    return max((_devices_of(folder) for folder in PCI_DEVICES.glob("*")), default=1) or 1


def computes_on_cpu() -> bool:
    """Whether XLA devices are the CPU, for trying out."""
    return os.environ.get(PJRT_DEVICE, "").upper() == "CPU"


def _on_cpu() -> Inventory:
    """For trying out. Importing torch_xla sets the variable where there is no TPU, so it tells of no wish."""
    text = os.environ.get("CPU_NUM_DEVICES") or "1"
    if not (text.isascii() and text.isdigit() and int(text)):
        return Inventory(note=f"CPU_NUM_DEVICES={text} is no number of devices")
    count = int(text)
    note = f"{PJRT_DEVICE}=CPU, {count} device(s)"
    return Inventory(tuple(range(count)), note=note, only_by_name=True)


def _devices_of(folder: Path) -> int:
    """How many TPU devices one device of the PCI bus is."""
    try:
        if (folder / "vendor").read_text().strip() != GOOGLE:
            return 0
        return TPU_CHIPS.get((folder / "device").read_text().strip(), 0)
    except OSError:
        return 0


def detect(environ: Mapping[str, str]) -> Detection | None:
    """Recognise a process that ``torch_xla.launch`` has started."""
    if LOCAL_RANK not in environ:
        return None
    note = f"{LOCAL_RANK} is set"
    per_node = environ.get(LOCAL_COUNT, "")
    if not re.fullmatch("[1-9][0-9]*", per_node):
        return Detection(note=note)
    everywhere = environ.get("TPU_PROCESS_ADDRESSES", "")
    processes = len(everywhere.split(",")) if everywhere else int(per_node)
    return Detection(int(per_node), max(1, processes // int(per_node)), note)
