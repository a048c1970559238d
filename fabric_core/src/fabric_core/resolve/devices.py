"""From ``devices=…`` to device indices."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from fabric_core.errors import DevicesError, listing
from fabric_core.plan import AUTO
from fabric_core.specs import Inventory

FORMS = "a count (2, '2'), all of them (-1, 'auto'), or a list of indices ([1, 4], '1, 4')"

_NAME = re.compile(r"(?=.*[\d-])[a-z][\w.:/-]*")  # not a word: a count in letters is a mistake


def normalise(devices: Any) -> int | tuple[int | str, ...] | str:
    """Bring every spelling of ``devices`` into one of three forms.

    Returns:
        A count (-1 for all), a tuple of indices and of what may be names (in lower case), or ``"auto"``. ``None``
        becomes the count 0.

    Raises:
        DevicesError: The value is none of the documented forms.
    """
    if devices is None:
        return 0
    if isinstance(devices, str):
        return _from_text(devices)
    if isinstance(devices, list | tuple):
        return _checked_list(devices, devices)
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
        indices = _indices(wanted, inventory, accelerator, devices)
        return _listed(indices, inventory, accelerator), f"devices={devices!r} lists them"
    return _counted(wanted, inventory, accelerator), f"devices={devices!r} was asked for"


def _from_text(text: str) -> int | tuple[int | str, ...] | str:
    stripped = text.strip().lower()
    if stripped == AUTO:
        return AUTO
    entries = [_number_or_name(part, text) for part in stripped.split(",") if part.strip()]
    if "," in stripped:
        return _checked_list(entries, text)
    if not entries:
        raise DevicesError(f"devices={text!r} is empty. It takes {FORMS}.")
    (entry,) = entries
    return _checked_count(entry) if isinstance(entry, int) else (entry,)


def _number_or_name(text: str, asked: str) -> int | str:
    with suppress(ValueError):
        return int(text)
    if not _may_be_name(text):
        raise DevicesError(f"devices={asked!r} is not understood. It takes {FORMS}.")
    return text.strip()


def _may_be_name(entry: Any) -> bool:
    return isinstance(entry, str) and bool(_NAME.fullmatch(entry.strip().lower()))


def _checked_count(count: int) -> int:
    if count < -1:
        raise DevicesError(
            f"devices={count} is negative; only -1 has a meaning (all of them). It takes {FORMS}."
        )
    return count


def _checked_list(entries: Any, asked: Any) -> tuple[int | str, ...]:
    if not entries:
        raise DevicesError(f"devices={asked!r} lists no device. It takes {FORMS}.")
    for entry in entries:
        is_index = isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0
        if not (is_index or _may_be_name(entry)):
            raise DevicesError(f"devices={asked!r} has to list device indices, whole numbers from 0.")
    _check_distinct(entries, asked)
    return tuple(entry.strip().lower() if isinstance(entry, str) else entry for entry in entries)


def _check_distinct(entries: Any, asked: Any) -> None:
    if len(set(entries)) < len(entries):
        raise DevicesError(f"devices={asked!r} names a device twice; each process needs a device of its own.")


def _indices(wanted: Any, inventory: Inventory, accelerator: str, asked: Any) -> tuple[int, ...]:
    """A list of indices and names, as indices."""
    found = tuple(
        _index_of(entry, inventory, accelerator, asked) if isinstance(entry, str) else entry
        for entry in wanted
    )
    _check_distinct(found, asked)
    return found


def _index_of(name: str, inventory: Inventory, accelerator: str, asked: Any) -> int:
    known = {other.lower(): index for other, index in inventory.names.items()}
    meant = {index for other, index in known.items() if other.startswith(name)}
    if name in known or len(meant) == 1:
        return known.get(name, *meant)
    what = f"{len(meant)} devices whose name begins with" if meant else "no device named"
    raise DevicesError(
        f"devices={asked!r} was asked for, but {accelerator!r} has {what} {name!r} here. There are: "
        f"{listing(inventory.names) if known else _numbers(inventory.indices)}. It takes {FORMS}."
    )


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
