"""Counts the functions that are called, in Python and in C."""

from __future__ import annotations

import sys
from collections.abc import Callable


def calls(operation: Callable[[], object], times: int = 1) -> int:
    """How many functions are called in this thread while an operation is done so many times."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        for _ in range(times):
            operation()
    finally:
        sys.setprofile(before)
    return count
