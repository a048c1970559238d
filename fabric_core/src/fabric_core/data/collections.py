"""Find the tensors in whatever a batch may be, and move or convert them.

[Note: what is walked] Dicts and other mappings, lists, tuples, named tuples, dataclass instances, and their
subclasses, nested in any way. The structure comes back with the same types. A container in which no tensor
changed comes back *as the same object*: data that is where it should be costs a look and no copy.
"""

from __future__ import annotations

import copy
import functools
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fabric_core.errors import ConfigurationError, WrongTypeError

__all__ = ["convert_floats", "map_entries", "map_tensors", "move_to_device", "to_scalars"]

T = TypeVar("T")
Change = Callable[[Any], Any]

_ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None)})


def map_tensors(fn: Callable[[Tensor], Any], data: T, *, into_movable: bool = True) -> T:
    """Apply ``fn`` to every tensor of a collection.

    Args:
        fn: Gets a tensor, returns what takes its place; the tensor itself when nothing changes.
        data: A tensor or a collection, see [Note: what is walked].
        into_movable: Whether to look into containers that have a method ``to``, as `mover` does not.

    Returns:
        The collection with the results in place of the tensors; ``data`` itself when nothing changed.

    Raises:
        WrongTypeError: A mapping that is neither a ``dict`` nor built from one holds a tensor that changed.
    """
    return _walk(data, fn, None if into_movable else _left_alone)  # type: ignore[no-any-return]


def map_entries(fn: Callable[[Any], Any], data: T) -> T:
    """Apply ``fn`` to every entry of a container, one level deep.

    Args:
        fn: Gets an entry, returns what takes its place; the entry itself when nothing changes.
        data: A container, see [Note: what is walked]; anything else is returned as it is.

    Returns:
        The container with the results; ``data`` itself when nothing changed.

    Raises:
        WrongTypeError: A mapping that is neither a ``dict`` nor built from one has entries that changed.
    """
    entries = _entries_of(data)
    if entries is None:
        return data
    items, rebuild = entries
    changes = {key: new for key, value in items if (new := fn(value)) is not value}
    return rebuild(data, changes) if changes else data


def move_to_device(data: T, device: torch.device | str) -> T:
    """Move every tensor of a collection to a device; see `mover`."""
    return _cached_mover(device)(data)


def mover(device: torch.device | str, *, non_blocking: bool | None = None) -> Callable[[T], T]:
    """Choose once how collections are moved to a device, for use once per batch.

    Besides tensors, everything whose class has a method ``to`` is moved by ``obj.to(device)`` (packed
    sequences, graphs, batches of a tokenizer). What is there already is returned as the same object.

    Args:
        device: Where to.
        non_blocking: Whether a copy may return before it is done, which helps from pinned memory only. By
            default yes for devices that order their work by streams, so that nothing reads a copy too early.
    """
    device = torch.device(device)
    asynchronous = _has_streams(device) if non_blocking is None else non_blocking

    def move_tensor(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=asynchronous)

    def move_tensor_to_host(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_cpu else tensor.to(device)

    def move_other(obj: Any) -> Any:
        moved = obj.to(device)
        return obj if moved is None else moved  # some classes move themselves in place

    def move(data: T) -> T:
        return _walk(data, move_tensor, move_other)  # type: ignore[no-any-return]

    def move_to_host(data: Any) -> Any:
        kind = type(data)
        for part in data.values() if kind is dict else data if kind is list or kind is tuple else (data,):
            if type(part) is not Tensor or not part.is_cpu:
                return _walk(data, move_tensor_to_host, move_other)
        return data  # what most loaders give: a flat container of plain tensors, all of them on the CPU

    return move_to_host if device.type == "cpu" else move


_cached_mover = functools.lru_cache(maxsize=64)(mover)


def convert_floats(data: T, dtype: torch.dtype) -> T:
    """Convert every real floating-point tensor of a collection; integer, boolean and complex ones stay."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype is dtype or not tensor.is_floating_point() else tensor.to(dtype)

    return map_tensors(convert, data)


def to_scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn tensors and NumPy numbers of one element into Python numbers, as loggers want them.

    Args:
        values: Names and values; what is no tensor and no NumPy number stays.

    Raises:
        ConfigurationError: A value has several elements, or none.
    """
    return {name: _to_scalar(name, value) for name, value in values.items()}


def _to_scalar(name: str, value: Any) -> Any:
    if type(value) in _ATOMS or not callable(getattr(type(value), "item", None)):
        return value
    try:
        return value.item()
    except (ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"The value {name!r} cannot be logged as one number: its shape is {tuple(value.shape)}. "
            f"Reduce it first, for example by {name}.mean()."
        ) from error


def _left_alone(obj: Any) -> Any:
    return obj


def _has_streams(device: torch.device) -> bool:
    if device.type == "cpu":
        return False
    try:
        return hasattr(torch.get_device_module(device), "Stream")
    except RuntimeError:  # a device type without a module of its own
        return False


def _walk(data: Any, on_tensor: Change, on_movable: Change | None) -> Any:
    kind = type(data)
    if kind is Tensor:
        return on_tensor(data)
    if kind in _ATOMS:
        return data
    if kind is dict:
        changes = _changes(data.items(), on_tensor, on_movable)
        return {**data, **changes} if changes else data
    if kind is list or kind is tuple:
        changes = _changes(enumerate(data), on_tensor, on_movable)
        return kind(_replaced(data, changes)) if changes else data
    return _walk_uncommon(data, on_tensor, on_movable)


def _walk_uncommon(data: Any, on_tensor: Change, on_movable: Change | None) -> Any:
    if isinstance(data, Tensor):
        return on_tensor(data)
    if isinstance(data, type):
        return data
    if on_movable is not None and callable(getattr(type(data), "to", None)):
        return on_movable(data)
    entries = _entries_of(data)
    if entries is None:
        return data
    items, rebuild = entries
    changes = _changes(items, on_tensor, on_movable)
    return rebuild(data, changes) if changes else data


def _entries_of(
    data: Any,
) -> tuple[Iterable[tuple[Any, Any]], Callable[[Any, Mapping[Any, Any]], Any]] | None:
    """The keys and values of a container, and what makes another one of it; ``None`` when it is none."""
    if isinstance(data, type):
        return None
    if isinstance(data, Mapping):
        return data.items(), _rebuild_mapping
    if isinstance(data, (list, tuple)):
        return enumerate(data), _rebuild_sequence
    if is_dataclass(data):
        names = [field.name for field in fields(data) if hasattr(data, field.name)]
        return [(name, getattr(data, name)) for name in names], _rebuild_dataclass
    return None


def _changes(
    items: Iterable[tuple[Any, Any]], on_tensor: Change, on_movable: Change | None
) -> dict[Any, Any]:
    changes = {}
    for key, value in items:
        new = on_tensor(value) if type(value) is Tensor else _walk(value, on_tensor, on_movable)
        if new is not value:
            changes[key] = new
    return changes


def _replaced(data: Iterable[Any], changes: Mapping[int, Any]) -> list[Any]:
    values = list(data)
    for index, value in changes.items():
        values[index] = value
    return values


def _rebuild_mapping(data: Any, changes: Mapping[Any, Any]) -> Any:
    if isinstance(data, (dict, UserDict)):
        # A shallow copy keeps what the class adds, such as a default factory or attributes.
        twin = copy.copy(data)
        for key, value in changes.items():
            twin[key] = value
        return twin
    try:
        return type(data)({**data, **changes})
    except TypeError as error:
        raise WrongTypeError(
            f"A batch holds tensors in a {type(data).__qualname__}, a mapping that cannot be rebuilt with "
            f"other values: {type(data).__qualname__}(a_dict) failed ({error}). "
            "Return a dict from the dataset or collate_fn, or give the class a method to(device)."
        ) from error


def _rebuild_sequence(data: Any, changes: Mapping[int, Any]) -> Any:
    values = _replaced(data, changes)
    if isinstance(data, list):
        twin = copy.copy(data)
        twin[:] = values
        return twin
    if hasattr(data, "_make"):  # a named tuple, whose constructor may have been overridden
        return data._make(values)
    return type(data)(values)


def _rebuild_dataclass(data: Any, changes: Mapping[str, Any]) -> Any:
    twin = copy.copy(data)
    for name, value in changes.items():
        object.__setattr__(twin, name, value)  # reaches frozen ones too, and runs no __post_init__
    return twin
