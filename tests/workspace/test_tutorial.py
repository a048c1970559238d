"""The strategy of the tutorial does what strategies promise."""

from __future__ import annotations

from pathlib import Path

import torch
from reader import PAGES, Reader, blocks

DIVIDED = """
import sys

import torch

import averaging
from fabric_core import Fabric

torch.set_default_dtype(torch.float64)
torch.manual_seed(int(sys.argv[2]))
features = torch.randn(6, 2, 8, 3)
fabric = Fabric(accelerator="cpu", strategy="averaging")
fabric.launch()
torch.manual_seed(int(sys.argv[2]) + fabric.global_rank)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9))
for window in features:
    for batch in window:
        mine = batch[fabric.global_rank :: fabric.world_size]
        with fabric.accumulate(model, every=2):
            fabric.backward(model(mine).square().mean())
            fabric.clip_gradients(model, optimizer, max_norm=0.9)
            optimizer.step()
            optimizer.zero_grad()
torch.save(model.state_dict(), f"{sys.argv[1]}-{fabric.global_rank}.pt")
fabric.close()
"""
"""A training by the strategy of the tutorial. Only rank 0 begins with the weights that the plain loop begins with."""


def test_the_strategy_of_the_tutorial_equals_a_plain_loop_on_two_processes(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    for block in blocks(PAGES / "tutorial.md"):
        if block.file == "averaging.py":
            reader.write(block)
    (reader.folder / "divided.py").write_text(DIVIDED, encoding="utf-8")
    reader.shell("fabric run --devices=2 divided.py weights 7")
    found = [torch.load(reader.folder / f"weights-{rank}.pt") for rank in (0, 1)]

    double = {"dtype": torch.float64}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        features = torch.randn(6, 2, 8, 3, **double)
        torch.manual_seed(7)
        layers = (torch.nn.Linear(3, 4, **double), torch.nn.Tanh(), torch.nn.Linear(4, 1, **double))
        model = torch.nn.Sequential(*layers)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for window in features:
        optimizer.zero_grad()
        for batch in window:
            (model(batch).square().mean() / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.9)
        optimizer.step()

    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name])
        for rank in (0, 1):
            torch.testing.assert_close(found[rank][name], value, rtol=1e-12, atol=1e-12)
