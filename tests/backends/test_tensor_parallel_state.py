"""Checkpoints of divided models on other meshes and under other strategies, and models that begin without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

TOLERANCE = 2e-6

TASK = """
import torch
from torch import nn
from torch.nn.functional import mse_loss

HALF = 4  # steps before the checkpoint, and after it

class Net(nn.Module):
    # (N, 6) to (N, 4)
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.first = nn.Linear(6, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(self.norm(x))))

def seeded(seed):
    torch.manual_seed(seed)
    return Net()

def data():
    generator = torch.Generator().manual_seed(5)
    rows = 2 * HALF * 8
    return list(zip(torch.randn(rows, 6, generator=generator), torch.randn(rows, 4, generator=generator)))
"""

SETTING = (
    TASK
    + """
import json
import warnings
from torch.utils.data import DataLoader
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from fabric_core import Fabric

rank, shape = int(os.environ.get("RANK", "0")), json.loads(os.environ["SHAPE"])
size = shape[0] * shape[1]

def plan(model, mesh):
    parallelize_module(model, mesh["tensor_parallel"], {"first": ColwiseParallel(), "last": RowwiseParallel()})

def opened(strategy="tensor_parallel", **options):
    if strategy == "tensor_parallel":
        sizes = {"data_parallel_size": shape[0], "tensor_parallel_size": shape[1]}
        options = {"parallelize_fn": plan, **sizes, **options}
    fabric = Fabric(accelerator="cpu", devices=size, strategy=strategy, strategy_options=options)
    fabric.launch()
    return fabric

def whole(module):
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for name, p in module.state_dict().items()}

class Run:
    def __init__(self, fabric, seed=3, empty=False):
        self.fabric = fabric
        if empty:
            with fabric.init_module(empty_init=True):
                model = Net()
            self.was_meta = all(p.is_meta for p in model.parameters())
            model = fabric.setup_module(model)
            self.optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.01))
        else:
            model = seeded(seed)
            model, self.optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
        self.model = model
        share = 8 // fabric.strategy.sampler_arguments["num_replicas"]
        self.loader = fabric.setup_dataloaders(DataLoader(data(), batch_size=share))
        self.step = 0

    def train(self):
        begin = self.step
        for number, (x, y) in enumerate(self.loader):
            if begin <= number < begin + HALF:
                self.fabric.backward(mse_loss(self.model(x), y))
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.step += 1
        return whole(self.model)

    def save(self, path):
        self.fabric.save(path, {"model": self.model, "optimizer": self.optimizer, "step": self.step})

    def load(self, path):
        state = {"model": self.model, "optimizer": self.optimizer, "step": 0}
        self.fabric.load(path, state)
        self.step = state["step"]
        return self
"""
)

BEGINNING = (
    SETTING
    + """
found = {}
with opened() as fabric:
    run = Run(fabric)
    run.train()
    run.save("sharded")
    found["trained on"] = run.train()
    found["shards"] = sorted(name for name in os.listdir("sharded") if name.startswith("shard-"))
with opened(checkpoint="full") as fabric:
    run = Run(fabric)
    run.train()
    run.save("full")
with opened() as fabric:
    torch.manual_seed(11 + rank)
    run = Run(fabric, empty=True)
    found["was meta"] = run.was_meta
    found["first values"] = whole(run.model)
    run.load("sharded")
    found["from nothing"] = run.train()
    found["everything"] = fabric.load("sharded")
answer(found)
"""
)

GOING_ON = (
    SETTING
    + """
found = {}
for kind in ("sharded", "full"):
    with opened() as fabric:
        found[f"from {kind}"] = Run(fabric, seed=8).load(kind).train()
with opened("ddp") as fabric:
    run = Run(fabric)
    run.train()
    run.save(f"of ddp on {shape}")
with opened() as fabric:
    found["from ddp"] = Run(fabric, seed=8).load(f"of ddp on {shape}").train()
with opened("ddp") as fabric:
    found["full by ddp"] = Run(fabric, seed=8).load("full").train()
with opened() as fabric:
    run = Run(fabric, seed=8)
    fabric.load_raw("bare.pt", run.model)
    found["bare"] = whole(run.model)
answer(found)
"""
)

ALONE = (
    SETTING
    + """
found = {}
for kind in ("sharded", "full"):
    with opened() as fabric:
        found[f"from {kind}"] = Run(fabric, seed=8).load(kind).train()
with opened("single_device") as fabric:
    found["full by one device"] = Run(fabric, seed=8).load("full").train()
answer(found)
"""
)


@pytest.fixture(scope="module")
def began(shared_programs: Any) -> list[dict[str, Any]]:
    """Four ranks, two by two, train a half, write checkpoints, and train on."""
    return shared_programs.answers_of(BEGINNING, 4, SHAPE="[2, 2]", timeout=110)


def plain(seed: int = 3, steps: int | None = None) -> dict[str, torch.Tensor]:
    """One process, whole batches, never interrupted."""
    scope: dict[str, Any] = {}
    exec(TASK, scope)
    with torch.random.fork_rng():
        model = scope["seeded"](seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rows = scope["data"]()
    for step in range(2 * scope["HALF"] if steps is None else steps):
        x, y = (torch.stack(column) for column in zip(*rows[step * 8 : step * 8 + 8], strict=True))
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in model.state_dict().items()}


def check(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], within: float = TOLERANCE
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= within, name


def test_training_goes_on_after_a_checkpoint(began: list[dict[str, Any]]) -> None:
    for found in began:
        check(found["trained on"], plain())
        assert found["shards"] == [f"shard-00000{rank}.safetensors" for rank in range(4)]


def test_a_model_without_memory_gets_the_values_of_a_plain_one_and_loads_a_checkpoint(
    began: list[dict[str, Any]],
) -> None:
    for found in began:
        assert found["was meta"]
        check(found["first values"], plain(seed=11, steps=0), within=0.0)
        check(found["from nothing"], plain())


def test_a_checkpoint_that_is_loaded_without_objects_is_plain_and_whole(began: list[dict[str, Any]]) -> None:
    for everything in (found["everything"] for found in began):
        assert everything["step"] == 4
        check(everything["model"], plain(steps=4))
        tensors = [*everything["model"].values(), *everything["optimizer"]["state"][0].values()]
        assert all(type(tensor) is torch.Tensor for tensor in tensors)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)], ids=["1x2", "2x1"])
def test_checkpoints_are_read_on_other_meshes_and_under_other_strategies(
    began: list[dict[str, Any]], shared_programs: Any, shape: tuple[int, int]
) -> None:
    assert began
    torch.save(plain(seed=5, steps=0), shared_programs.folder / "bare.pt")
    answers = shared_programs.answers_of(GOING_ON, 2, SHAPE=str(list(shape)), timeout=110)
    for found in answers:
        check(found.pop("bare"), plain(seed=5, steps=0), within=0.0)
        for result in found.values():
            check(result, plain())


def test_one_process_reads_what_four_have_written(began: list[dict[str, Any]], shared_programs: Any) -> None:
    assert began
    for result in shared_programs.answers_of(ALONE, 1, SHAPE="[1, 1]")[0].values():
        check(result, plain())
