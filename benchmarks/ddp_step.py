"""A training step on two processes.

Data-parallel training over gloo, SGD: a perceptron of 1 million parameters, one of 16 million, and a tiny model (72
parameters) that accumulates 4 micro-batches per step, where only overhead shows. CPU time is per rank.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

from harness import ACCELERATE, LIGHTNING, OURS, PLAIN, Case, Measure, Operation, Operations, Target, main

MILLION, SIXTEEN, TINY = "1 M parameters", "16 M parameters", "tiny, accumulation of 4"
WIDTHS = {MILLION: (512, 4), SIXTEEN: (2048, 4), TINY: (8, 1)}


def plain(case: str) -> Operation:
    """``DistributedDataParallel`` by hand."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model, optimizer, rows = _work(case)
    model = DistributedDataParallel(model)

    def step() -> None:
        model(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def accumulate() -> None:
        for index in range(4):
            with nullcontext() if index == 3 else model.no_sync():
                (model(rows).square().mean() / 4).backward()
        optimizer.step()
        optimizer.zero_grad()

    return accumulate if case == TINY else step


def lightning_fabric(case: str) -> Operation:
    """Through the peer's verbs."""
    from lightning_fabric import Fabric

    peer = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    peer.launch()
    model, optimizer, rows = _work(case)
    model, optimizer = peer.setup(model, optimizer)

    def step() -> None:
        peer.backward(model(rows).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def accumulate() -> None:
        for index in range(4):
            with peer.no_backward_sync(model, enabled=index < 3):
                peer.backward(model(rows).square().mean() / 4)
        optimizer.step()
        optimizer.zero_grad()

    return accumulate if case == TINY else step


def accelerate(case: str) -> Operation:
    """Through the peer's verbs."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # a second one in this process, where this is quick, may differ
    peer = Accelerator(cpu=True, gradient_accumulation_steps=4 if case == TINY else 1)
    assert peer.num_processes == 2
    model, optimizer, rows = _work(case)
    model, optimizer = peer.prepare(model, optimizer)

    def step() -> None:
        peer.backward(model(rows).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def accumulate() -> None:
        for _ in range(4):
            with peer.accumulate(model):
                step()

    return accumulate if case == TINY else step


def fabric(case: str) -> Operation:
    """Through ours."""
    from fabric_core import Fabric

    ours = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    ours.launch()
    model, optimizer, rows = _work(case)
    model, optimizer = ours.setup(model, optimizer)

    def step() -> None:
        ours.backward(model(rows).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def accumulate() -> None:
        for _ in range(4):
            with ours.accumulate(model, every=4):
                step()

    return accumulate if case == TINY else step


def _work(case: str) -> Any:
    """Model, optimizer and rows, the same for all."""
    import torch

    torch.manual_seed(0)
    width, layers = WIDTHS[case]
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    return model, torch.optim.SGD(model.parameters(), lr=0.01), torch.randn(4, width)


FIGURE = Operations(
    name="ddp_step",
    about=__doc__,
    contenders={PLAIN: plain, LIGHTNING: lightning_fabric, ACCELERATE: accelerate, OURS: fabric},
    ranks=2,
    cases=(
        Case(MILLION, calls=10, rounds=40),
        Case(SIXTEEN, calls=2, rounds=15),
        Case(TINY, calls=20, rounds=60),
    ),
    measures=(Measure("cpu", "ms", "CPU"), Measure("wall", "ms", "wall"), Measure("calls", "", "calls")),
    targets=(Target(MILLION, "cpu", 1.0), Target(SIXTEEN, "cpu", 0.95)),
)

if __name__ == "__main__":
    main(FIGURE)
