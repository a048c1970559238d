"""Starts, phase by phase, and prints as JSON what each phase has imported, opened, looked at and searched.

    python start.py fabric|plain

Calls of the file system are counted where Python makes them: those of the import system and of ``os``. What C libraries
do is not seen, and is the same for both.
"""

from __future__ import annotations

import json
import os
import posix
import resource
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

METADATA = (".dist-info", ".egg-info")
found: dict[str, dict[str, int]] = {}
counts: dict[str, int] = {}


def counted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[what] = counts.get(what, 0) + 1
        return function(*args, **kwargs)

    return call


def opened(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(args[0], str):
        folder, name = os.path.split(args[0])
        kind = (
            "metadata"
            if folder.endswith(METADATA)
            else "modules'"
            if name.endswith((".py", ".pyc", ".so"))
            else "other"
        )
        counts[f"{kind} files opened"] = counts.get(f"{kind} files opened", 0) + 1
    elif event in ("os.listdir", "os.scandir"):
        counts["folders listed"] = counts.get("folders listed", 0) + 1


def phase(name: str) -> None:
    """Keep what was counted since the last one."""
    found[name] = {**counts, "modules": len(sys.modules) - sum(seen["modules"] for seen in found.values())}
    counts.clear()


def calls(operation: Callable[[], object]) -> int:
    """How many functions it calls, in Python and in C."""
    events: list[str] = []
    sys.setprofile(lambda _frame, event, _argument: events.append(event))
    try:
        operation()
    finally:
        sys.setprofile(None)
    return events.count("call") + events.count("c_call")


def peak() -> float:
    """Megabytes. What ``getrusage`` tells on Linux is at least that of the process that has started this one."""
    if sys.platform == "linux":
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def plain() -> None:
    import torch

    phase("torch")
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(4, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    phase("training")


def fabric() -> None:
    import fabric_core

    phase("fabric_core")
    import torch

    phase("torch")
    from fabric_core import Fabric

    phase("Fabric")
    fabric = Fabric(accelerator="cpu", devices=1)
    phase("Fabric()")
    again = calls(lambda: Fabric(accelerator="cpu", devices=1))
    phase("Fabric() again")
    found["Fabric() again"]["calls"] = again
    model = torch.nn.Linear(8, 8)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        fabric.backward(model(torch.ones(4, 8)).sum())
        optimizer.step()
        optimizer.zero_grad()
    phase("training")
    assert fabric_core.Fabric is Fabric


if __name__ == "__main__":
    installed = len([*metadata.distributions()])
    sys.addaudithook(opened)
    os.stat = posix.stat = counted("stats", os.stat)
    counts.clear()
    phase("interpreter")
    {"plain": plain, "fabric": fabric}[sys.argv[1]]()
    sys.stdout.write(json.dumps({"phases": found, "installed": installed, "peak": peak()}))
