"""A contender's process: it makes its operation, then answers each request on its standard input with one sample."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

Operation = Callable[[], object]
Make = Callable[[str], Operation]
"""From a case to what one call of it does."""


def serve(make: Make, cases: list[str], core: int | None) -> None:
    """Answer until the input ends. What the operation prints goes to the standard error.

    Args:
        make: The contender.
        cases: Which to make, in this order.
        core: The processor's core to stay on while it is measured.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    operations: dict[str, Operation] = {}
    for case in cases:
        operations[case] = make(case)
        gc.collect()
        started = time.process_time()
        operations[case]()
        _answer(answers, {"first": time.process_time() - started})
    if core is not None:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {core})
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        operation = operations[request["case"]]
        gc.collect()
        if request["trimmed"]:
            ctypes.CDLL(None).malloc_trim(0)
        _answer(answers, _ACTIONS[request["do"]](operation, request["calls"]))


def _answer(answers: TextIO, sample: Mapping[str, float]) -> None:
    print(json.dumps(sample), file=answers, flush=True)


def _time(operation: Operation, calls: int) -> dict[str, float]:
    """Seconds per call: of the clock, of all threads, and of the one that calls.

    A garbage collection that is due falls into no block.
    """
    gc.freeze()
    gc.disable()
    try:
        before = [clock() for clock in _CLOCKS.values()]
        for _ in range(calls):
            operation()
        after = [clock() for clock in _CLOCKS.values()]
    finally:
        gc.enable()
    return {name: (end - begin) / calls for name, begin, end in zip(_CLOCKS, before, after, strict=True)}


def _count(operation: Operation, calls: int) -> dict[str, float]:
    """Python and C functions that one call calls, in this thread; the same on every machine."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        for _ in range(calls):
            operation()
    finally:
        sys.setprofile(None)
    return {"calls": count / calls}


def _grow(operation: Operation, _calls: int) -> dict[str, float]:
    """Bytes that the process needs during one call beyond what it had, at the most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # what is free goes back to the system, so that it counts when it is used again
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = _status("VmRSS")
    operation()
    return {"growth": _status("VmHWM") - before}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


_CLOCKS: Mapping[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "cpu": time.process_time,
    "caller": time.thread_time,
}

_ACTIONS: Mapping[str, Callable[[Operation, int], dict[str, float]]] = {
    "time": _time,
    "count": _count,
    "grow": _grow,
}
