"""Collectives.

Two processes, gloo, a tensor of 16 numbers. Plain PyTorch reduces in place and gathers into one tensor that is made
anew; an object is broadcast by ``broadcast_object_list``. CPU time is per rank: of all threads, and of the one that
calls, in which all is done that a library adds. The threads of gloo wait for each other in that of all: it differs by
more from round to round than what is looked for, also of plain PyTorch from itself. The libraries' verbs change no
tensor of the caller's, so they reduce a copy, as *plain, copied* does; lightning-fabric's waits at a barrier, too.
"""

from __future__ import annotations

import os
from typing import Any

from harness import (
    ACCELERATE,
    LIGHTNING,
    OURS,
    PLAIN,
    Against,
    Case,
    Measure,
    Operation,
    Operations,
    Target,
    main,
)

COPIED = "plain, copied"
REDUCE, GATHER, BROADCAST, BARRIER = "all_reduce", "all_gather", "broadcast of an object", "barrier"
OBJECT = {"epoch": 3, "name": "run"}


def plain(case: str) -> Operation:
    """``torch.distributed``."""
    return _plain(case, copied=False)


def plain_copied(case: str) -> Operation:
    """The same, with a copy of what is reduced."""
    return _plain(case, copied=True)


def _plain(case: str, copied: bool) -> Operation:
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    tensor = torch.zeros(16)
    return {
        REDUCE: lambda: dist.all_reduce(tensor.clone() if copied else tensor),
        GATHER: lambda: dist.all_gather_into_tensor(torch.empty(2 * 16), tensor),
        BROADCAST: lambda: dist.broadcast_object_list([OBJECT]),
        BARRIER: dist.barrier,
    }[case]


def lightning_fabric(case: str) -> Operation:
    """The peer's verbs."""
    import torch
    from lightning_fabric import Fabric

    peer = _once(lambda: Fabric(accelerator="cpu", devices=2, strategy="ddp"))
    tensor = torch.zeros(16)
    return {
        REDUCE: lambda: peer.all_reduce(tensor, reduce_op="sum"),
        GATHER: lambda: peer.all_gather(tensor),
        BROADCAST: lambda: peer.broadcast(OBJECT),
        BARRIER: peer.barrier,
    }[case]


def accelerate(case: str) -> Operation:
    """The peer's verbs."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list

    peer = Accelerator(cpu=True)
    assert peer.num_processes == 2
    tensor = torch.zeros(16)
    return {
        REDUCE: lambda: peer.reduce(tensor, reduction="sum"),
        GATHER: lambda: peer.gather(tensor),
        BROADCAST: lambda: broadcast_object_list([OBJECT]),
        BARRIER: peer.wait_for_everyone,
    }[case]


def fabric(case: str) -> Operation:
    """Our verbs."""
    import torch

    from fabric_core import Fabric

    ours = _once(lambda: Fabric(accelerator="cpu", devices=2, strategy="ddp"))
    tensor = torch.zeros(16)
    return {
        REDUCE: lambda: ours.all_reduce(tensor, reduce_op="sum"),
        GATHER: lambda: ours.all_gather(tensor),
        BROADCAST: lambda: ours.broadcast(OBJECT),
        BARRIER: ours.barrier,
    }[case]


_MADE: list[Any] = []


def _once(make: Any) -> Any:
    """One object for all cases of this process, launched."""
    if not _MADE:
        _MADE.append(make())
        _MADE[0].launch()
    return _MADE[0]


COPYING = (
    f"Compare *{COPIED}*: half is the copy. Calling eight functions of Python on the way to the same one of PyTorch,"
    " after the caches went cold in a wait, is the rest: names of reductions, numbers and nested data, means of "
    "whole numbers."
)
EVERYBODY = (PLAIN, LIGHTNING, ACCELERATE, OURS)

FIGURE = Operations(
    name="collectives",
    about=__doc__,
    contenders={
        PLAIN: plain,
        COPIED: plain_copied,
        LIGHTNING: lightning_fabric,
        ACCELERATE: accelerate,
        OURS: fabric,
    },
    ranks=2,
    cases=(
        Case(REDUCE, calls=50, rounds=60),
        *(Case(name, calls=50, rounds=60, contenders=EVERYBODY) for name in (GATHER, BROADCAST, BARRIER)),
    ),
    measures=(
        Measure("cpu", "µs", "CPU"),
        Measure("caller", "µs", "CPU of the caller"),
        Measure("wall", "µs", "wall"),
        Measure("calls", "", "calls"),
    ),
    targets=(
        Target(REDUCE, "caller", 10, Against.OVER, why=COPYING),
        Target(GATHER, "caller", 10, Against.OVER),
    ),
)

if __name__ == "__main__":
    main(FIGURE)
