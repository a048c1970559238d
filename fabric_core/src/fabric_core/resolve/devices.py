"""From ``devices=…`` to device indices."""

from __future__ import annotations

from typing import Any

from fabric_core.errors import DevicesError
from fabric_core.plan import AUTO
from fabric_core.specs import Inventory

FORMS = "a count (2, '2'), all of them (-1, 'auto'), or a list of indices ([1, 4], '1, 4')"


def normalise(devices: Any) -> int | tuple[int, ...] | str:
    """Bring every spelling of ``devices`` into one of three forms.

    Returns:
        A count (-1 for all), a tuple of indices, or ``"auto"``. ``None`` becomes the count 0.

    Raises:
        DevicesError: The value is none of the documented forms.
    """
    if devices is None:
        return 0
    if isinstance(devices, str):
        return _from_text(devices)
    if isinstance(devices, list | tuple):
        return _checked_indices(devices, devices)
    if isinstance(devices, int) and not isinstance(devices, bool):
        return _checked_count(devices)
    raise DevicesError(f"devices={devices!r} is not understood. It takes {FORMS}.")


def is_cpu_request(devices: Any) -> bool:
    """Whether ``devices`` is the old way to say: no accelerator, one process (``None`` or ``0``)."""
    return normalise(devices) == 0


def choose(
    devices: Any,
    inventory: Inventory,
    accelerator: str,
    started: int | None = None,
    most: int | None = None,
    own_devices: bool = False,
) -> tuple[tuple[int, ...], str]:
    """The device indices on this node, and one sentence why.

    Args:
        devices: What the user asked for.
        inventory: What the probe found.
        accelerator: Its name, for messages.
        started: How many processes a cluster environment has started on this node, if it says.
        most: How many devices the parts that were named can use on a node; ``"auto"`` takes no more.
        own_devices: Whether each of the started processes sees its own device only, and calls it the first one.

    Raises:
        DevicesError: More devices than exist, or indices that do not.
    """
    wanted = normalise(devices)
    if own_devices and started is not None and not inventory.virtual and wanted in (AUTO, started, -1):
        return inventory.indices[:1] * started, f"each of {started} process(es) sees one device of its own"
    if isinstance(wanted, str):
        return _automatic(inventory, started, most)
    if isinstance(wanted, tuple):
        return _listed(wanted, inventory, accelerator), f"devices={devices!r} lists them"
    return _counted(wanted, inventory, accelerator), f"devices={devices!r} was asked for"


def _from_text(text: str) -> int | tuple[int, ...] | str:
    stripped = text.strip().lower()
    if stripped == AUTO:
        return AUTO
    try:
        numbers = [int(part) for part in stripped.split(",") if part.strip()]
    except ValueError:
        raise DevicesError(f"devices={text!r} is not understood. It takes {FORMS}.") from None
    if "," in stripped:
        return _checked_indices(numbers, text)
    if not numbers:
        raise DevicesError(f"devices={text!r} is empty. It takes {FORMS}.")
    return _checked_count(numbers[0])


def _checked_count(count: int) -> int:
    if count < -1:
        raise DevicesError(
            f"devices={count} is negative; only -1 has a meaning (all of them). It takes {FORMS}."
        )
    return count


def _checked_indices(indices: Any, asked: Any) -> tuple[int, ...]:
    if not indices:
        raise DevicesError(f"devices={asked!r} lists no device. It takes {FORMS}.")
    if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in indices):
        raise DevicesError(f"devices={asked!r} has to list device indices, whole numbers from 0.")
    if len(set(indices)) < len(indices):
        raise DevicesError(f"devices={asked!r} names a device twice; each process needs a device of its own.")
    return tuple(indices)


def _automatic(inventory: Inventory, started: int | None, most: int | None) -> tuple[tuple[int, ...], str]:
    if started is not None and (inventory.virtual or started <= len(inventory.indices)):
        indices = inventory.indices or tuple(range(started))
        return indices[:started], f"auto: {started} process(es) were started on this node"
    if inventory.virtual:
        count = inventory.default or 1
        return tuple(range(count)), f"auto: {count} process(es)"
    found = inventory.indices[: inventory.default]
    if most is not None and most < len(found):
        return found[:most], f"auto: {len(found)} were found, and {most} can be used"
    return (
        found,
        "auto: all that were found" if found == inventory.indices else "auto: what the accelerator advises",
    )


def _listed(wanted: tuple[int, ...], inventory: Inventory, accelerator: str) -> tuple[int, ...]:
    if inventory.virtual:
        raise DevicesError(
            f"devices={list(wanted)} lists device indices, but on {accelerator!r} a device is a process and has none. "
            f"Ask for a count: devices={len(wanted)}."
        )
    missing = sorted(set(wanted) - set(inventory.indices))
    if missing:
        raise DevicesError(
            f"devices={list(wanted)} was asked for, but {accelerator!r} has no device {_numbers(missing)} here. "
            f"There are: {_numbers(inventory.indices)}."
        )
    return wanted


def _counted(count: int, inventory: Inventory, accelerator: str) -> tuple[int, ...]:
    if inventory.virtual:
        return tuple(range(count if count > 0 else inventory.default or 1))
    if count == -1:
        return inventory.indices
    if count > len(inventory.indices):
        raise DevicesError(
            f"{count} devices were asked for, but {accelerator!r} has {len(inventory.indices)} here: "
            f"{_numbers(inventory.indices)}. Ask for fewer, or for all with devices=-1."
        )
    return inventory.indices[:count]


def _numbers(indices: Any) -> str:
    return ", ".join(map(str, indices)) or "none"
