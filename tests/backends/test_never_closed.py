"""A script that never closes its Fabric ends well: no thread of a process group outlasts the interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
from torch import nn
from fabric_core import Fabric

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))

    def parallelize(self, mesh):
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
        plan = {"first": ColwiseParallel(), "last": RowwiseParallel()}
        parallelize_module(self, mesh["tensor_parallel"], plan)

fabric = Fabric(accelerator="cpu", strategy=sys.argv[1])
model = Net()
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
for _ in range(2):
    fabric.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    optimizer.zero_grad()
fabric.save("last", {"model": model, "optimizer": optimizer})
fabric.backward(model(torch.ones(2, 4)).sum())
"""

KEPT = """
from torch import distributed

def as_a_library_does(group=distributed.group.WORLD):
    pass

works = []
leaf = torch.ones(100_000, requires_grad=True)
leaf.register_hook(lambda gradient: works.append(distributed.all_reduce(gradient.clone(), async_op=True)))
leaf.sum().backward()  # during which each thread has Python objects of its own
works.pop().wait()
"""


@pytest.mark.parametrize(
    "strategy",
    ["ddp", "ddp_sharded", "fsdp", "fsdp_hybrid", "tensor_parallel", "context_parallel", "deepspeed"],
)
def test_a_script_that_never_closes_ends_well(strategy: str, tmp_path: Path) -> None:
    ends_well(tmp_path, SCRIPT, strategy)


@pytest.mark.parametrize("last", ["", "fabric.close()"])
def test_a_script_that_keeps_the_process_group_for_good_ends_well(last: str, tmp_path: Path) -> None:
    ends_well(tmp_path, SCRIPT + KEPT + last, "ddp")


def ends_well(folder: Path, script: str, strategy: str) -> None:
    (folder / "script.py").write_text(script)
    command = ("-m", "fabric_core", "run", "--devices=2", "script.py", strategy)
    for _ in range(2):  # what goes wrong at the end of a process does so now and then
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
