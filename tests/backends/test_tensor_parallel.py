"""Tensor parallel on real processes and three meshes, against a plain PyTorch loop over the same global batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

TOLERANCE = 2e-6  # float32, of parameters and losses around 1
TOLERANCE_ON_GPUS = 1e-4  # whose kernels are others than those of the plain loop, which is on the CPU

TASK = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu

STEPS, BATCH, WORDS = 12, 8, 12

class Net(nn.Module):
    # tokens (N, T) to scores (N, T, 12)
    def __init__(self, tied=False):
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens):
        x = self.words(tokens)
        return self.head(x + self.down(gelu(self.up(self.norm(x)))))

def seeded(seed, tied=False):
    torch.manual_seed(seed)
    return Net(tied)

def data(batches=STEPS):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(WORDS, (batches * BATCH, 7), generator=generator)

def loss_of(model, tokens):
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

def optimizers_of(model, two):
    if not two:
        return [torch.optim.AdamW(model.parameters(), lr=0.01)]
    up = [*model.up.parameters(), *model.norm.parameters()]
    rest = [p for p in model.parameters() if all(p is not other for other in up)]
    return [torch.optim.SGD(up, lr=0.1, momentum=0.9), torch.optim.AdamW(rest, lr=0.01)]
"""

PLANS = """
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

def columns_and_rows(model, mesh):
    parallelize_module(model, mesh["tensor_parallel"], {
        "up": ColwiseParallel(), "down": RowwiseParallel(), "head": ColwiseParallel(output_layouts=Replicate()),
    })

def partly_sharded(model, mesh):
    columns_and_rows(model, mesh)
    fully_shard(model.norm, mesh=mesh["data_parallel"])
    return model

def along_the_sequence(model, mesh, **head):
    parallelize_module(model, mesh["tensor_parallel"], {
        "words": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), **(head or {"output_layouts": Replicate()})),
    })

def loss_in_shards(model, mesh):
    along_the_sequence(model, mesh, output_layouts=Shard(-1), use_local_output=False)

def tied(model, mesh):
    parallelize_module(model, mesh["tensor_parallel"], {
        "words": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Replicate()),
    })
    model.head.weight = model.words.weight
"""

TRAINING = (
    TASK
    + PLANS
    + """
import json, sys
from torch.utils.data import DataLoader
from fabric_core import Fabric

rank, shape = int(os.environ["RANK"]), json.loads(os.environ["SHAPE"])
SIZES = {"data_parallel_size": shape[0], "tensor_parallel_size": shape[1]}

def whole(module):
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().cpu().clone()
            for name, p in module.named_parameters()}

def opened(plan, precision="32-true", **options):
    return Fabric(accelerator=os.environ["ACCELERATOR"], devices=shape[0] * shape[1], precision=precision,
                  strategy="tensor_parallel", strategy_options={"parallelize_fn": plan, **SIZES, **options})

def train(plan, every=1, norm=None, value=None, two=False, late=False, is_tied=False, precision="32-true", **options):
    with opened(plan, precision, **options) as fabric:
        fabric.launch()
        model = seeded(3 + rank, is_tied)  # only rank 0 has the weights of the plain loop
        if late:
            model = fabric.setup_module(model)
            optimizers = optimizers_of(model, two)
            ready = fabric.setup_optimizers(*optimizers)
            optimizers = [ready] if len(optimizers) == 1 else ready
        else:
            model, *optimizers = fabric.setup(model, *optimizers_of(model, two))
        torch.rand(rank)  # the ranks go apart, and the loop brings them together
        tokens = data(STEPS * every - (every > 1))
        loader = fabric.setup_dataloaders(DataLoader(tokens, batch_size=BATCH // shape[0]))
        losses, norms = [], []
        for batch in loader:
            with fabric.accumulate(model, every=every):
                loss = loss_of(model, batch)
                fabric.backward(loss)
                for optimizer in optimizers:
                    if norm is not None:
                        norms.append(fabric.clip_gradients(model, optimizer, max_norm=norm))
                    if value is not None:
                        fabric.clip_gradients(model, optimizer, clip_val=value)
                    optimizer.step()
                for optimizer in optimizers:
                    optimizer.zero_grad()
            losses.append(fabric.all_reduce(loss.detach()).item())
        plain = all(type(one) is torch.Tensor for one in norms if one is not None)
        return {"losses": losses, "norms": [float(one) for one in norms if one is not None], "plain": plain,
                "parameters": whole(model)}

answer({
    "plainly": train(columns_and_rows),
    "partly sharded by the user": train(partly_sharded),
    "along the sequence": train(along_the_sequence),
    "with the loss in shards": train(loss_in_shards, loss_parallel=True),
    "with tied weights": train(tied, is_tied=True),
    "accumulating": train(columns_and_rows, every=3),
    "clipping the norm": train(along_the_sequence, norm=0.1),
    "clipping values": train(columns_and_rows, value=0.003),
    "two optimizers": train(columns_and_rows, two=True),
    "everything": train(loss_in_shards, every=3, norm=0.1, two=True, late=True, loss_parallel=True),
})
"""
)


@dataclass
class Trained:
    """What the plain loop leaves."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, torch.Tensor]


def plain_loop(
    every: int = 1,
    norm: float | None = None,
    value: float | None = None,
    two: bool = False,
    is_tied: bool = False,
) -> Trained:
    """One process, whole batches."""
    scope: dict[str, Any] = {}
    exec(TASK, scope)
    model = scope["seeded"](3, is_tied)
    optimizers = scope["optimizers_of"](model, two)
    tokens = scope["data"](scope["STEPS"] * every - (every > 1))
    batches = list(tokens.split(scope["BATCH"]))
    losses, norms = [], []
    for begin in range(0, len(batches), every):
        window = batches[begin : begin + every]
        for batch in window:
            loss = scope["loss_of"](model, batch)
            (loss / len(window)).backward()
            losses.append(loss.item())
        for optimizer in optimizers:
            own = [p for group in optimizer.param_groups for p in group["params"]]
            if norm is not None:
                norms.append(float(torch.nn.utils.clip_grad_norm_(own, norm)))
            if value is not None:
                torch.nn.utils.clip_grad_value_(own, value)
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return Trained(losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()})


PLAIN: dict[str, dict[str, Any]] = {
    "plainly": {},
    "partly sharded by the user": {},
    "along the sequence": {},
    "with the loss in shards": {},
    "with tied weights": {"is_tied": True},
    "accumulating": {"every": 3},
    "clipping the norm": {"norm": 0.1},
    "clipping values": {"value": 0.003},
    "two optimizers": {"two": True},
    "everything": {"every": 3, "norm": 0.1, "two": True},
}
MESHES = {
    "1x2": ("cpu", 1, 2),
    "2x1": ("cpu", 2, 1),
    "2x2": ("cpu", 2, 2),
    "1x2 on GPUs": ("cuda", 1, 2),
}
TWO_GPUS = (
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not run: needs two GPUs"),
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=TWO_GPUS if "GPU" in name else ()) for name in MESHES],
)
def trained(request: pytest.FixtureRequest, shared_programs: Any) -> list[dict[str, Any]]:
    """What each rank of a mesh (data, tensor) found."""
    accelerator, data, tensor = MESHES[request.param]
    setting = {"SHAPE": f"[{data}, {tensor}]", "ACCELERATOR": accelerator}
    return shared_programs.answers_of(TRAINING, data * tensor, timeout=110, **setting)


@pytest.mark.parametrize("how", PLAIN)
def test_a_mesh_trains_as_one_process_does_on_the_whole_batch(
    trained: list[dict[str, Any]], how: str, request: pytest.FixtureRequest
) -> None:
    tolerance = TOLERANCE_ON_GPUS if "GPU" in request.node.callspec.params["trained"] else TOLERANCE
    with torch.random.fork_rng():
        expected = plain_loop(**PLAIN[how])
    for found in (answer[how] for answer in trained):
        assert found["losses"] == pytest.approx(expected.losses, abs=tolerance)
        assert found["norms"] == pytest.approx(expected.norms, abs=tolerance)
        assert found["plain"]
        assert found["parameters"].keys() == expected.parameters.keys()
        for name, value in expected.parameters.items():
            assert (found["parameters"][name] - value).abs().max() <= tolerance, name
            assert torch.equal(found["parameters"][name], trained[0][how]["parameters"][name]), name
