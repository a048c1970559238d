"""Trees: dictionaries, lists and tuples of tensors and values, as checkpoints are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

__all__ = ["mapped", "named"]


def mapped(tree: Any, function: Callable[[Any], Any], kinds: type | tuple[type, ...]) -> Any:
    """Copy dictionaries, lists and tuples, with a function applied to what is of some kinds in them, in their order.

    Dictionaries keep their type and attributes, as state dicts have them; anything else is left as it is.

    Args:
        tree: What to copy.
        function: Gets something of these kinds, returns what takes its place.
        kinds: Which types it is for.
    """
    if isinstance(tree, kinds):
        return function(tree)
    if isinstance(tree, dict):
        result = copy.copy(tree)
        for key, value in tree.items():
            result[key] = mapped(value, function, kinds)
        return result
    if type(tree) in (list, tuple):
        return type(tree)(mapped(value, function, kinds) for value in tree)
    return tree


def named(tree: Any, wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """What is wanted in dictionaries, lists and tuples, by dotted names, in their order.

    Two that would have one name are told apart by apostrophes; the same tree always gives the same names.
    """
    found: dict[str, Any] = {}

    def visit(value: Any, name: str) -> None:
        if wanted(value):
            while name in found:
                name += "'"
            found[name] = value
            return
        entries: Any = ()
        if isinstance(value, dict):
            entries = value.items()
        elif type(value) in (list, tuple):
            entries = enumerate(value)
        for key, entry in entries:
            visit(entry, f"{name}.{key}" if name else str(key))

    visit(tree, "")
    return found
