"""What a training step costs beside plain PyTorch, in one process on the CPU, with a model so small that it shows.

    .venv/bin/python benchmarks/step.py

Both loops take turns in one process, in short blocks. The smallest CPU time per step counts, and the calls of Python
and C functions, which do not depend on what else the machine is doing.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fabric_core import Fabric

Step = Callable[[], None]


def plain_step(precision: str) -> Step:
    """One step of a loop without this library."""
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = torch.randn(4, 8)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
            loss = model(inputs).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def fabric_step(precision: str) -> Step:
    """The same through the verbs."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model = nn.Linear(8, 8)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
    inputs = torch.randn(4, 8)

    def step() -> None:
        loss = model(inputs).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def microseconds(step: Step, steps: int) -> float:
    """CPU time of one step, from a block of them."""
    started = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - started) / steps * 1e6


def calls(step: Step) -> int:
    """How many Python and C functions one step calls."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    step()
    sys.setprofile(None)
    return count


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="blocks of each loop")
    parser.add_argument("--steps", type=int, default=100, help="steps of a block")
    args = parser.parse_args()

    torch.set_num_threads(1)
    table = Table(
        "precision", "loop", "µs of CPU per step", "x plain", "calls per step", title="One training step"
    )
    for precision in ("32-true", "bf16-mixed"):
        loops = {"plain": plain_step(precision), "fabric": fabric_step(precision)}
        for step in loops.values():
            microseconds(step, args.steps)
        gc.collect()
        blocks = [
            {name: microseconds(step, args.steps) for name, step in loops.items()} for _ in range(args.rounds)
        ]
        least = {name: min(block[name] for block in blocks) for name in loops}
        for name, step in loops.items():
            ratio = least[name] / least["plain"]
            table.add_row(precision, name, f"{least[name]:.1f}", f"{ratio:.2f}", str(calls(step)))
    Console().print(table)


if __name__ == "__main__":
    main()
