"""What tests of sharded strategies train, on every rank; the tests import it for their plain loops."""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.nn.functional import mse_loss

from fabric_core import Fabric

STEPS = 6

rank = int(os.environ.get("RANK", "0"))
world = int(os.environ.get("WORLD_SIZE", "1"))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Shapes that no number of ranks divides evenly; on four, some ranks hold nothing of some parameters."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(6, 3)
        self.register_buffer("offset", torch.ones(6))
        self.calls = 0

    def forward(self, x):
        x = self.first(x) + self.offset
        for block in self.blocks:
            x = block(x)
        return self.last(x)

    def twice(self, x):
        return self(x) + self.first(x).sum() * 0

    def count(self):
        self.calls += 1
        return self.calls


def seeded(seed=7):
    torch.manual_seed(seed)
    return Net()


def batches(steps=STEPS):
    torch.manual_seed(1000)
    return torch.randn(steps * 8, 5), torch.randn(steps * 8, 3)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def fabric_for(strategy="fsdp", precision="32-true", **options):
    return Fabric(accelerator="cpu", strategy=strategy, precision=precision, strategy_options=options)


def whole(tree):
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return (tree.full_tensor() if hasattr(tree, "full_tensor") else tree).detach().clone()


def loader(fabric, steps=STEPS):
    dataset = torch.utils.data.TensorDataset(*batches(steps))
    return fabric.setup_dataloaders(torch.utils.data.DataLoader(dataset, batch_size=8 // world))


def loop(fabric, model, optimizer, every=1, clip=None, steps=STEPS):
    norms = []
    for inputs, targets in loader(fabric, steps):
        with fabric.accumulate(model, every=every):
            fabric.backward(mse_loss(model(inputs), targets))
            if clip is not None:
                norms.append(fabric.clip_gradients(model, optimizer, max_norm=clip[0], norm_type=clip[1]))
            optimizer.step()
            optimizer.zero_grad()
    return norms


def train(seed=7, how=sgd, **told):
    options = {name: told.pop(name) for name in ("every", "clip") if name in told}
    with fabric_for(**told) as fabric:
        model = seeded(seed + rank)  # only rank 0 has the weights of the plain loop
        model, optimizer = fabric.setup(model, how(model))
        norms = loop(fabric, model, optimizer, **options)
        return whole(model.state_dict()), norms


def adam(model):
    """In two groups, the second of which holds parameters of all shapes."""
    groups = [{"params": model.first.parameters(), "lr": 0.02}]
    rest = [*model.blocks.parameters(), *model.last.parameters()]
    return torch.optim.AdamW([*groups, {"params": rest}], lr=0.01)
