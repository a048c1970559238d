# What a user types into a notebook, cell by cell (separated by lines of dashes). Not run as a program.
import os

import torch

from fabric_core import Fabric

big = torch.randn(400, 400)
(big @ big).sum().item()  # uses the threads of the parent before anything forks


def train(fabric, steps):
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(steps):
        loss = model(torch.full((32, 64), float(fabric.global_rank + 1))).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return fabric.world_size, fabric.all_reduce(loss.detach()).item(), model.state_dict()


# ------------------------------------------------------------------------------------------------------------------
fabric = Fabric(devices=2)
first = fabric.launch(train, steps=3)
print(fabric.plan.strategy.name, first[0], first[1])
# ------------------------------------------------------------------------------------------------------------------
second = Fabric(strategy="ddp_notebook", devices=2).launch(train, steps=3)
print(second[0], second[1], all(torch.equal(first[2][key], second[2][key]) for key in first[2]))


# ------------------------------------------------------------------------------------------------------------------
def fail(fabric):
    if fabric.global_rank == 1:
        raise ValueError("a cell with a fault")
    fabric.barrier()


try:
    Fabric(strategy="ddp_notebook", devices=2).launch(fail)
except Exception as error:
    print(type(error).__name__, str(error).strip().splitlines()[-1])
# ------------------------------------------------------------------------------------------------------------------
print(sorted(name for name in os.environ if name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "FABRIC_LAUNCHED")))
try:
    Fabric(strategy="ddp", devices=2)
except ValueError as error:
    print("ddp_notebook" in str(error))
