"""Sections about what a ``Fabric`` leaves behind when it is closed."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from fabric_core.supervisor.variables import LISTEN_FD
from fabric_core.testing.plain_loop import CASES
from fabric_core.testing.programs.task import Task
from fabric_core.testing.programs.training import Training

PATIENCE = 2.0  # seconds that a thread or process is given to end
NOT_ITS_OWN = (LISTEN_FD, "TORCHINDUCTOR_CACHE_DIR")
"""Variables that others change meanwhile: a rank takes the socket that its starter has left open for it, once; and
PyTorch notes where it keeps compiled code, when some part of it first asks for that."""


def closing(task: Task) -> dict[str, Any]:
    """Three ``Fabric`` after each other. Threads of pools come with the first; none may come with the third."""
    before = _Left.now()
    counts: list[int] = []
    for _ in range(3):
        fabric = task.fabric()
        with fabric:
            training = Training(fabric, CASES["plain"], build=task.build)
            training.run(end=2)
        counts.append(_os_threads(at_most=counts[-1] if counts else None))
    found = _Left.now().since(before)
    del training
    found |= {"os threads": counts, "second teardown": _error_of(fabric.strategy.teardown)}
    return found | {"group": dist.is_available() and dist.is_initialized()}


def unused(task: Task) -> dict[str, Any]:
    """A ``Fabric`` that is closed before it has done anything."""
    before = _Left.now()
    fabric = task.fabric()
    made = _Left.now().since(before)
    error = _error_of(fabric.close)
    return {"made": made, "error": error, "group": dist.is_available() and dist.is_initialized()}


class _Left:
    """Threads, processes and variables of this process at a moment."""

    def __init__(self, threads: set[str], children: set[str], variables: dict[str, str]) -> None:
        self.threads, self.children, self.variables = threads, children, variables

    @classmethod
    def now(cls) -> _Left:
        return cls(_threads(), _children(), dict(os.environ))

    def since(self, before: _Left) -> dict[str, Any]:
        """What has come since then; what is just ending is given a moment."""
        until = time.monotonic() + PATIENCE
        now = self
        while (now.threads - before.threads or now.children - before.children) and time.monotonic() < until:
            time.sleep(0.05)
            now = _Left.now()
        changed = {
            name
            for name in now.variables.keys() | before.variables.keys()
            if name not in NOT_ITS_OWN and now.variables.get(name) != before.variables.get(name)
        }
        return {
            "threads": sorted(now.threads - before.threads),
            "processes": sorted(now.children - before.children),
            "variables": sorted(changed),
        }


def _threads() -> set[str]:
    return {f"{thread.name} ({thread.ident})" for thread in threading.enumerate()}


def _children() -> set[str]:
    import psutil

    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.add(f"{child.pid} ({' '.join(child.cmdline())[:200]})")
    return found


def _os_threads(at_most: int | None) -> int:
    """How many threads the operating system counts; when there are more than that, a moment later."""
    import psutil

    gc.collect()  # what is garbage already is nothing that closing has left
    until = time.monotonic() + PATIENCE
    while True:
        count = int(psutil.Process().num_threads())
        if at_most is None or count <= at_most or time.monotonic() > until:
            return count
        time.sleep(0.05)


def _error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


SECTIONS: dict[str, Callable[..., Any]] = {"closing": closing, "unused": unused}
