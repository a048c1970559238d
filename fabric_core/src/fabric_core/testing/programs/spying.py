"""Seeing who reads environment variables."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from typing import Any


class Spy(os._Environ):  # type: ignore[type-arg]
    """``os.environ``, which notes what modules of some packages read.

    Args:
        packages: Their top-level names.
    """

    def __init__(self, packages: set[str]) -> None:
        real: Any = os.environ
        super().__init__(real._data, real.encodekey, real.decodekey, real.encodevalue, real.decodevalue)
        self.packages = packages
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> str:
        self._note(key)
        value: str = super().__getitem__(key)
        return value

    def __iter__(self) -> Iterator[str]:
        self._note("all variables")
        return super().__iter__()

    def _note(self, key: str) -> None:
        frame = sys._getframe(2)
        while frame is not None:
            name = str(frame.f_globals.get("__name__", ""))
            if name.partition(".")[0] in self.packages:
                self.read.add(f"{key} ({name})")
                return
            frame = frame.f_back  # type: ignore[assignment]


def spied_environment(modules: list[str]) -> dict[str, list[str]]:
    """Import hooks modules, and call their hooks, and see what that does with the environment.

    Args:
        modules: By their dotted names.

    Returns:
        What is ``read``, and what is ``changed``.
    """
    before = dict(os.environ)
    spy = Spy({module.partition(".")[0] for module in modules})
    os.environ = spy  # noqa: B003  it is the same environment, seen through the spy
    for name in modules:
        module = importlib.import_module(name)
        for hook, function in inspect.getmembers(module, inspect.isfunction):
            if hook.startswith("fabric_") and not inspect.signature(function).parameters:
                list(function() or ())
    read, now = sorted(spy.read), dict(os.environ._data)  # type: ignore[attr-defined]
    changed = {
        key
        for key in {*before, *map(os.fsdecode, now)}
        if before.get(key) != _text(now.get(os.fsencode(key)))
    }
    return {"read": read, "changed": sorted(changed)}


def _text(value: Any) -> str | None:
    return None if value is None else os.fsdecode(value)
