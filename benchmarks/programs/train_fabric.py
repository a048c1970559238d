"""A minimal training through this library: on one process, or as one rank of several."""

import sys

import torch
from report import steps

from fabric_core import Fabric

devices = int(sys.argv[1])
fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
fabric.launch()
model = torch.nn.Linear(8, 8)
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
assert fabric.world_size == devices
for _ in steps(devices):
    fabric.backward(model(torch.randn(4, 8)).square().mean())
    optimizer.step()
    optimizer.zero_grad()
fabric.close()
