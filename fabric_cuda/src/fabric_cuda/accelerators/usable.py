"""Finding devices that can be used, and among them those that nobody else uses."""

from __future__ import annotations

from contextlib import suppress

from fabric_core.errors import DevicesError
from fabric_cuda.accelerators.asking import ask
from fabric_cuda.accelerators.nvml import NVMLError, library
from fabric_cuda.accelerators.probes import cuda

_TRY = """
import json, sys, torch
indices, wanted = json.loads(sys.argv[1])
failed, usable = {}, []
for index in indices:
    if len(usable) == wanted:
        break
    try:
        torch.empty(1, device=f"cuda:{index}")
        torch.cuda.synchronize(index)
    except RuntimeError as error:
        failed[index] = (str(error).splitlines() or ["no reason given"])[0]
    else:
        usable.append(index)
print(json.dumps([usable, list(failed.items())]))
"""


def find_usable_devices(num_devices: int = -1) -> list[int]:
    """Find devices that a process can use, those that are free first. For ``Fabric(devices=find_usable_devices(2))``.

    Which are free is what the driver says: no process computes there, and most memory is free. Whether a device can be
    used is tried in a process of its own, so that this one may still be forked, and a device in exclusive mode that
    another process holds is passed over. Nothing is reserved: two jobs that look at the same time find the same
    devices. Call it before the launch, not on every rank.

    Args:
        num_devices: How many; -1 for all that can be used.

    Returns:
        Their indices, sorted, as ``devices=[…]`` takes them.

    Raises:
        DevicesError: There are not as many.
    """
    if (
        isinstance(num_devices, bool)
        or not isinstance(num_devices, int)
        or not (num_devices > 0 or num_devices == -1)
    ):
        raise DevicesError(
            f"find_usable_devices({num_devices!r}) has to be given a number from 1, or -1 for all that can be used."
        )
    inventory = cuda()
    if not inventory.available:
        raise DevicesError(f"find_usable_devices found no device: {inventory.note}.")
    present = len(inventory.indices)
    if num_devices > present:
        raise DevicesError(
            f"find_usable_devices({num_devices}) was asked for, but this process sees {present} device(s). Ask for "
            "fewer, or for all that can be used with -1."
        )
    by_index = {index: uuid for uuid, index in inventory.names.items()}
    order = sorted(inventory.indices, key=lambda index: (*_busy(by_index.get(index)), index))
    usable, failed = ask(_TRY, [order, num_devices])
    if len(usable) < max(num_devices, 1):
        reasons = "; ".join(f"device {index}: {reason}" for index, reason in sorted(failed))
        asked = "at least one device" if num_devices == -1 else f"{num_devices} device(s)"
        raise DevicesError(
            f"{asked} that can be used was asked for, but of {present} there are {len(usable)}. {reasons}. Wait until "
            "another process ends, or ask for fewer."
        )
    return sorted(usable)


def _busy(uuid: str | None) -> tuple[bool, float]:
    """Whether others compute there, and how much of the memory is taken (0 to 1); unknown counts as free."""
    nvml = library()
    if nvml is None or uuid is None:
        return False, 0.0
    processes, taken = 0, 0.0
    with suppress(NVMLError):
        processes = nvml.processes(uuid)
    with suppress(NVMLError):
        taken = 1 - nvml.free_memory(uuid) / nvml.total_memory(uuid)
    return processes > 0, round(taken, 2)
