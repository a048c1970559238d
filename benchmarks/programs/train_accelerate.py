"""A minimal training through accelerate: on one process, or as one rank of several."""

import sys

import torch
from accelerate import Accelerator
from report import steps

devices = int(sys.argv[1])
accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(8, 8)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
assert accelerator.num_processes == devices
for _ in steps(devices):
    accelerator.backward(model(torch.randn(4, 8)).square().mean())
    optimizer.step()
    optimizer.zero_grad()
accelerator.end_training()
