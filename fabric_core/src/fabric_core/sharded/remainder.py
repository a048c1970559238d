"""What of a checkpoint in shards nobody has asked for: a dictionary whose tensors are read when somebody uses them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fabric_core.sharded.stored import StoredTensor, plain
from fabric_core.sharded.trees import mapped, named

__all__ = ["Later", "Remainder", "is_postponed", "needs_file", "postponed", "read_now"]


@dataclass(frozen=True)
class Later:
    """A stored tensor that stays one, whoever makes everything else plain."""

    stored: StoredTensor


def postponed(tree: Any) -> Any:
    """The same with `Later` in the place of stored tensors."""
    return mapped(tree, Later, StoredTensor)


def is_postponed(tree: Any) -> bool:
    """Whether there is anything to be read in it."""
    return bool(_later_in(tree))


def read_now(tree: Any, path: Path | None = None) -> Any:
    """The same with tensors in the place of `Later`, read by this process alone.

    Args:
        tree: What `postponed` gave.
        path: Where a copy of the checkpoint is, when it is no longer where it was.

    Raises:
        CheckpointError: It is not there any more, or damaged.
    """
    moved = cache(lambda source: source if path is None else source.at(path))
    return plain(mapped(tree, lambda later: replace(later.stored, source=moved(later.stored.source)), Later))


def needs_file(tree: Any) -> bool:
    """Whether there is something in it for which the checkpoint has to be there still."""
    return any(later.stored.source.needs_file for later in _later_in(tree))


class Remainder(dict[Any, Any]):
    """A dictionary; a value that has tensors in shards is read, and checked, the first time that it is asked for.

    Looking for keys, printing and deleting read nothing; comparing, copying and pickling read everything.

    Args:
        values: With `Later` in the place of what is not read yet.
        read: Makes of a key and its value the value without `Later`, and needs nothing of other ranks.
    """

    def __init__(self, values: Mapping[Any, Any], read: Callable[[Any, Any], Any]) -> None:
        super().__init__(values)
        self._read = read
        self._unread = {key: sizes for key, value in values.items() if (sizes := _sizes(value))}

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        if key in self._unread:
            self[key] = value = self._read(key, value)
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self._unread.pop(key, None)

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)
        self._unread.pop(key, None)

    def __iter__(self) -> Iterator[Any]:
        # A dictionary that has its own is copied by its methods, and not by its memory.
        return super().__iter__()

    # What a dict does in C would pass by the methods above. These come back to them.
    get = Mapping.get  # type: ignore[assignment]
    items = Mapping.items  # type: ignore[assignment]
    values = Mapping.values  # type: ignore[assignment]
    setdefault = MutableMapping.setdefault
    update = MutableMapping.update

    def pop(self, key: Any, *default: Any) -> Any:
        """The value of a key, which is forgotten; without the key, the default."""
        if key not in self:
            return super().pop(key, *default)
        value = self[key]
        del self[key]
        return value

    def popitem(self) -> tuple[Any, Any]:
        """The last key, and its value."""
        key = next(reversed(self), None)
        return (key, self.pop(key)) if self else super().popitem()

    def clear(self) -> None:
        """Forget everything, and read nothing."""
        super().clear()
        self._unread.clear()

    def copy(self) -> dict[Any, Any]:
        """A plain dictionary."""
        return dict(self.items())

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self.keys() == other.keys() and self.copy() == dict(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __repr__(self) -> str:
        shown = (f"{key!r}: {self._unread.get(key) or repr(value)}" for key, value in super().items())
        return f"{{{', '.join(shown)}}}"

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())  # which torch.load reads without trust, too

    def state_parts(self) -> dict[Any, Any]:
        """What goes into a checkpoint."""
        return self.copy()


def _later_in(tree: Any) -> list[Later]:
    return list(named(tree, lambda each: isinstance(each, Later)).values())


def _sizes(value: Any) -> str:
    """What is to be read of a value, in words; empty when it is all there."""
    stored = [later.stored for later in _later_in(value)]
    size = sum(each.shape.numel() * each.dtype.itemsize for each in stored)
    return f"<{len(stored)} tensor(s), {size / 1e6:.1f} MB, not read yet>" if stored else ""
