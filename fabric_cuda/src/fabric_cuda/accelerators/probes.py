"""Looking for devices. None is initialised, so that a fork works afterwards.

PyTorch is imported only where the machine shows a trace of a device.
"""

from __future__ import annotations

import os
import sys

from fabric_backends.accelerators.current import current_type
from fabric_backends.accelerators.probes import reason_to_ask
from fabric_core.specs import Inventory


def cuda() -> Inventory:
    """The devices of a PyTorch that is built for CUDA or ROCm."""
    if "torch" not in sys.modules and not reason_to_ask():
        return Inventory(note="nothing here suggests a device that the installed PyTorch could use")
    current = current_type()
    if current != "cuda":
        return Inventory(note=f"the accelerator of the installed PyTorch is {current!r}")
    from fabric_cuda.accelerators.visible import HIDING, uuids

    found = uuids()
    if found:
        names = {uuid: index for index, uuid in enumerate(found) if uuid}
        return Inventory(tuple(range(len(found))), note=f"{len(found)} device(s)", names=names)
    hiding = [f"{name}={os.environ[name]!r}" for name in HIDING if name in os.environ]
    why = f"{' and '.join(hiding)} may hide it" if hiding else "is its driver installed and running?"
    return Inventory(note=f"the installed PyTorch is built for it, but finds no device: {why}")
