"""A minimal training through lightning-fabric: on one process, or as one rank of several."""

import sys

import torch
from lightning_fabric import Fabric
from report import steps

devices = int(sys.argv[1])
# Its command has launched already, and a second time is an error; on one process launch() does nothing.
fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
model = torch.nn.Linear(8, 8)
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
assert fabric.world_size == devices
for _ in steps(devices):
    fabric.backward(model(torch.randn(4, 8)).square().mean())
    optimizer.step()
    optimizer.zero_grad()
if devices > 1:  # it leaves the group to the interpreter's end, where a rank may die of it
    del model
    torch.distributed.destroy_process_group()
