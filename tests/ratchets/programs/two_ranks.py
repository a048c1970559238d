"""Counts, on each of two ranks, what verbs and data-parallel steps cost beside plain PyTorch. Prints JSON on rank 0."""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # a plain loop loads it with its first optimizer
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
from counting import calls

from fabric_core import Fabric

ROWS = torch.linspace(-1, 1, 32).reshape(4, 8)
MESSAGE = {"epoch": 3, "name": "run"}
Operation = Callable[[], object]


def collectives(fabric: Fabric) -> dict[str, tuple[Operation, Operation]]:
    """Each verb, and what it is in plain PyTorch."""
    tensor = torch.zeros(16)

    def plain_mean() -> None:
        total = tensor.clone()
        dist.all_reduce(total)
        total /= dist.get_world_size()

    return {
        "all_reduce": (plain_mean, lambda: fabric.all_reduce(tensor)),
        "all_gather": (
            lambda: dist.all_gather_into_tensor(torch.empty(2 * 16), tensor),
            lambda: fabric.all_gather(tensor),
        ),
        "broadcast of an object": (
            lambda: dist.broadcast_object_list([MESSAGE]),
            lambda: fabric.broadcast(MESSAGE),
        ),
        "barrier": (dist.barrier, fabric.barrier),
    }


def work() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(8, 8)
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def plain_steps() -> tuple[Operation, Operation]:
    """A step, and a window of 4 micro-batches, by hand."""
    raw, optimizer = work()
    model = DistributedDataParallel(raw, gradient_as_bucket_view=True)

    def step() -> None:
        model(ROWS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def window() -> None:
        for index in range(4):
            with nullcontext() if index == 3 else model.no_sync():
                (model(ROWS).square().mean() / 4).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, window


def fabric_steps(fabric: Fabric) -> tuple[Operation, Operation]:
    """The same through the verbs."""
    model, optimizer = fabric.setup(*work())

    def step() -> None:
        fabric.backward(model(ROWS).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def window() -> None:
        for _ in range(4):
            with fabric.accumulate(model, every=4):
                step()

    return step, window


def settled(operation: Operation) -> Operation:
    """After everything that happens once."""
    for _ in range(3):
        operation()
    gc.collect()
    return operation


def operations(operation: Operation) -> dict[str, int]:
    """What is asked of the process group, by the names of PyTorch's operators."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        operation()
    return Counter(event.name for event in profiled.events() if event.name.startswith("c10d::"))


def main() -> None:
    """Count."""
    with Fabric(accelerator="cpu", devices=2, strategy="ddp") as fabric:
        fabric.launch()
        steps = zip(("DDP step", "DDP window of 4"), plain_steps(), fabric_steps(fabric), strict=True)
        pairs: dict[str, Any] = collectives(fabric) | {name: (plain, ours) for name, plain, ours in steps}
        found = {}
        for name, pair in pairs.items():
            plain, ours = (calls(settled(operation)) for operation in pair)
            found[name] = {"calls over plain": ours - plain, "operations": operations(pair[1])}
        fabric.print(json.dumps(found))


if __name__ == "__main__":
    main()
