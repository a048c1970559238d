"""A minimal training, by hand: on one process, or as one rank of several."""

import sys

import torch
from report import steps

devices = int(sys.argv[1])
model = torch.nn.Linear(8, 8)
if devices > 1:
    torch.distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in steps(devices):
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
if devices > 1:
    del model  # before the group that it uses
    torch.distributed.destroy_process_group()
