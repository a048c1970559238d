"""Looking for devices. No device is initialised, and PyTorch is imported only where one may be.

Only PyTorch itself can say for certain, but importing it takes seconds, and a command that trains nothing has no use
for it. So there has to be a reason: it is imported already, or it is built for a device of which the machine shows a
trace, or an installed package announces a device to it.
"""

from __future__ import annotations

import functools
import glob
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from fabric_backends.accelerators.current import current_type
from fabric_backends.hooks import DEVICE_TYPES, MPS
from fabric_core.specs import Inventory

DEVICE_PLUGINS = b"[torch.backends]"
"""The entry points with which packages announce devices of their own, and that ``import torch`` follows."""

TRACES: dict[str, tuple[tuple[str, ...], str]] = {
    "cuda": (("/dev/nvidia*", "/dev/nvhost*", "/dev/nvmap", "/dev/dxg"), "0x10de"),
    "hip": (("/dev/kfd", "/dev/dxg"), "0x1002"),
    "xpu": (("/dev/dri/render*", "/dev/dxg"), "0x8086"),
}
"""What a build of PyTorch needs: device files of which one is there, or a PCI vendor. Known for Linux."""

PCI_VENDORS = "/sys/bus/pci/devices/*/vendor"


def mps() -> Inventory:
    """The GPU of an Apple computer."""
    if (sys.platform, platform.machine()) != ("darwin", "arm64"):
        return Inventory(note="this is no Apple computer with an M chip")
    import torch

    if not torch.backends.mps.is_available():
        return Inventory(note="this PyTorch or this macOS cannot use it")
    return Inventory((0,))


def torch_accelerator() -> Inventory:
    """The accelerator of the installed PyTorch, when no spec has it by name."""
    device_type, note = _current_type()
    if device_type is None or device_type in (MPS.name, *DEVICE_TYPES):
        return Inventory(note=note)
    return _devices(device_type)


def __getattr__(name: str) -> Callable[[], Inventory]:
    """``probes:xpu`` and its like: a probe for each device type that has a name of its own."""
    if name not in DEVICE_TYPES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return functools.partial(_named, name)


def _named(device_type: str) -> Inventory:
    current, note = _current_type()
    return _devices(device_type) if current == device_type else Inventory(note=note)


def _devices(device_type: str) -> Inventory:
    import torch

    # Unlike is_available, counting leaves the device alone (on CUDA as long as NVML answers), so that a fork works.
    count = torch.get_device_module(device_type).device_count()
    if not count:
        return Inventory(note=f"the installed PyTorch is built for {device_type!r}, but finds no such device")
    return Inventory(tuple(range(count)), note=f"{count} {device_type} device(s)")


def _current_type() -> tuple[str | None, str]:
    """The type of the accelerator that PyTorch is built for, and a sentence."""
    if "torch" not in sys.modules and not reason_to_ask():
        return None, "nothing here suggests a device that the installed PyTorch could use"
    current = current_type()
    if current is None:
        return None, "the installed PyTorch is built without an accelerator"
    return current, f"the accelerator of the installed PyTorch is {current!r}"


@functools.cache
def reason_to_ask() -> str:
    """Why there may be a device; empty when there is no reason. What is installed later is imported by then."""
    for build in _builds():
        trace = _trace(build)
        if trace:
            return f"PyTorch is built for {build}, and there is {trace}"
    return _announced()


def _builds() -> Iterator[str]:
    """What the installed PyTorch is built for, as its ``version.py`` says."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder, "version.py")
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        yield from re.findall(rf"^({'|'.join(TRACES)})\b[^=\n]*=\s*['\"]", text, re.MULTILINE)


def _trace(build: str) -> str:
    """What of the machine suggests that a build finds its device; empty when nothing does."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform}, where nothing rules it out"
    patterns, vendor = TRACES[build]
    for pattern in patterns:
        for path in glob.iglob(pattern):
            return path
    for path in glob.iglob(PCI_VENDORS):
        if Path(path).read_text(encoding="ascii").strip() == vendor:
            return path
    return ""


def _announced() -> str:
    """An installed package that offers a device to PyTorch; empty when there is none."""
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
        return ""
    # importlib.metadata would take three times as long, to find packages in zip files too.
    for folder in sys.path:
        for name in _entries(folder or "."):
            if name.endswith((".dist-info", ".egg-info")) and DEVICE_PLUGINS in _entry_points(folder, name):
                return f"{name} announces a device"
    return ""


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # a folder that is not there, or a zip file
        return []


def _entry_points(folder: str, package: str) -> bytes:
    try:
        with open(os.path.join(folder, package, "entry_points.txt"), "rb") as file:
            return file.read()
    except OSError:  # most have none
        return b""
