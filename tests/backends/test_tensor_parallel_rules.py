"""What tensor parallel guarantees between ranks, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fabric_backends.meshes import axis_sizes
from fabric_backends.strategies.tensor_parallel import TensorParallelStrategy
from fabric_core import Fabric
from fabric_core.errors import OptionsError, SetupError, UnsupportedError

SETTING = """
import json
from torch import nn
from torch.nn.functional import mse_loss
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel, loss_parallel, parallelize_module,
)
from torch.utils.data import DataLoader, TensorDataset
from fabric_core import Fabric

shape = json.loads(os.environ["SHAPE"])

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.first = nn.Linear(6, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        return self.last(torch.relu(self.first(self.norm(x))))

    def encode(self, x):
        return self.first(x)

def plan(model, mesh):
    parallelize_module(model, mesh["tensor_parallel"], {"first": ColwiseParallel(), "last": RowwiseParallel()})

class Planned(Net):
    parallelize = plan

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(8, 6), nn.Linear(6, 8, bias=False)
        self.head.weight = self.words.weight

    def parallelize(self, mesh):
        parallelize_module(self, mesh["tensor_parallel"], {
            "words": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Replicate()),
        })

def leaves_one_out(model, mesh):
    plan(model, mesh)
    fully_shard(model, mesh=mesh["data_parallel"], ignored_params={model.norm.weight})

def opened(precision="32-true", **options):
    sizes = {"data_parallel_size": shape[0], "tensor_parallel_size": shape[1]}
    return Fabric(accelerator="cpu", devices=shape[0] * shape[1], strategy="tensor_parallel", precision=precision,
                  strategy_options={**sizes, **options})

def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

found = {}
at_first = threads() + (rank == 0)  # which will serve the store
"""

BETWEEN_RANKS = (
    SETTING
    + """
# The mesh, and who reads what.
with opened() as fabric:
    found["too early"] = error_of(lambda: fabric.strategy.mesh)
    fabric.launch()
    fabric.barrier()
    mesh = fabric.strategy.mesh
    found["mesh"] = mesh.mesh_dim_names, tuple(mesh.shape), mesh.get_coordinate()
    found["share"] = fabric.strategy.sampler_arguments
    found["gathered"] = fabric.all_gather(rank).tolist(), float(fabric.all_reduce(float(rank), reduce_op="sum"))

    # Ranks whose random numbers have gone apart read the same batches, and drop the same activations.
    model, optimizer = fabric.setup(planned := Planned(), torch.optim.SGD(planned.parameters(), lr=0.1))
    rows = torch.arange(48, dtype=torch.float32).reshape(8, 6)
    loader = fabric.setup_dataloaders(DataLoader(rows, batch_size=2, shuffle=True))
    orders, dropped = [], []
    for epoch in range(2):
        torch.rand(rank * 3)
        for batch in loader:
            orders.append(batch[:, 0].tolist())
            dropped.append(nn.functional.dropout(batch + 1).tolist())
    found["orders"], found["dropped"] = orders, dropped

    # A dataset that looks at the rank is found out at its first batch.
    other = fabric.setup_dataloaders(DataLoader(rows + fabric.global_rank, batch_size=2))
    found["different"] = error_of(lambda: next(iter(other)))
    found["bypass"] = error_of(model.encode, rows)
    found["copied"] = error_of(__import__("copy").deepcopy, model) if shape[0] > 1 else None

# A loss scale falls on all ranks when a gradient on one is infinite, and all leave the step out.
with opened("16-mixed", parallelize_fn=plan) as fabric:
    fabric.launch()
    model, optimizer = fabric.setup(net := Net(), torch.optim.SGD(net.parameters(), lr=0.1))
    before = {name: local(p).detach().clone() for name, p in model.named_parameters()}
    fabric.backward(mse_loss(model(torch.ones(2, 6)), torch.ones(2, 4)))
    if fabric.global_rank == fabric.world_size - 1:
        local(model.first.weight.grad).fill_(float("inf"))
    optimizer.step()
    same = all(torch.equal(local(p), before[name]) for name, p in model.named_parameters())
    fabric.backward(mse_loss(model(torch.ones(2, 6)), torch.ones(2, 4)))
    found["skipped"] = same, fabric._parts.precision.scaler.get_scale()

# Weights that one model shares, gradients that nothing would average, and plans that are none.
def refused(model, **options):
    with opened(**options) as fabric:
        fabric.launch()
        return error_of(fabric.setup, model)

def first_step(plan):
    torch.manual_seed(0)  # by chance, gradients of ranks can be as good as equal
    with opened(parallelize_fn=plan) as fabric:
        fabric.launch()
        model, optimizer = fabric.setup(net := Net(), torch.optim.SGD(net.parameters(), lr=0.1))
        fabric.backward(model(torch.arange(24.0).reshape(4, 6).sin()).square().mean())
        return error_of(optimizer.step)

def forgets_the_norm(model, mesh):
    # rows are divided between the ranks up to the first layer
    parallelize_module(model, mesh["tensor_parallel"], {
        "norm": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0), use_local_output=True),
        "first": ColwiseParallel(input_layouts=Shard(0)), "last": RowwiseParallel(),
    })

def remembers_the_norm(model, mesh):
    parallelize_module(model, mesh["tensor_parallel"], {
        "norm": SequenceParallel(sequence_dim=0),
        "first": ColwiseParallel(input_layouts=Shard(0)), "last": RowwiseParallel(),
    })

# A block of the user's own inside of the option's.
def closed():
    with opened(parallelize_fn=plan, loss_parallel=True) as fabric:
        fabric.launch()
        fabric.barrier()
        with loss_parallel():
            pass

found["own block"] = error_of(closed)
found["forgotten"] = first_step(forgets_the_norm)
found["remembered"] = first_step(remembers_the_norm)
found["tied"] = refused(Tied())
found["returned"] = refused(Net(), parallelize_fn=lambda model, mesh: 7)
found["no plan"] = refused(Net())
found["no function"] = refused(Net(), parallelize_fn="nowhere_at_all:plan")
found["by name"] = refused(Net(), parallelize_fn="__main__:plan")
found["left out"] = refused(Net(), parallelize_fn=leaves_one_out)

# What is left of all these groups, though models on their meshes live on; those that were refused are garbage.
__import__("gc").collect()
deadline = time.monotonic() + 30
while threads() > at_first and time.monotonic() < deadline:
    time.sleep(0.05)
found["threads"] = threads() - at_first
answer(found)
"""
)


@pytest.fixture(scope="module", params=[(1, 2), (2, 2)], ids=["1x2", "2x2"])
def between(request: pytest.FixtureRequest, shared_programs: Any) -> tuple[tuple[int, int], list[Any]]:
    """A mesh (data, tensor), and what each of its ranks found."""
    shape = request.param
    ranks = shape[0] * shape[1]
    return shape, shared_programs.answers_of(BETWEEN_RANKS, ranks, SHAPE=str(list(shape)), timeout=110)


def test_the_mesh_has_two_named_axes_and_data_is_split_along_one(
    between: tuple[tuple[int, int], list[Any]],
) -> None:
    (data, tensor), answers = between
    for rank, found in enumerate(answers):
        place = (rank // tensor, rank % tensor)
        assert found["mesh"] == (("data_parallel", "tensor_parallel"), (data, tensor), place)
        assert found["share"] == {"num_replicas": data, "rank": place[0]}
        assert found["too early"][0] == "SetupError"


def test_collectives_are_over_all_ranks(between: tuple[tuple[int, int], list[Any]]) -> None:
    ranks = list(range(len(between[1])))
    for found in between[1]:
        assert found["gathered"] == (ranks, sum(ranks))


def test_ranks_of_a_group_read_the_same_batches_in_an_order_that_changes(
    between: tuple[tuple[int, int], list[Any]],
) -> None:
    (data, tensor), answers = between
    for begin in range(0, data * tensor, tensor):
        group = answers[begin : begin + tensor]
        assert all(found["orders"] == group[0]["orders"] for found in group)
        assert all(found["dropped"] == group[0]["dropped"] for found in group)
        orders = group[0]["orders"]
        assert orders[: len(orders) // 2] != orders[len(orders) // 2 :]


def test_different_batches_in_a_group_are_an_error(between: tuple[tuple[int, int], list[Any]]) -> None:
    for found in between[1]:
        name, message = found["different"]
        assert name == "SetupError"
        assert "their first batches differ" in message


def test_an_infinite_gradient_on_one_rank_skips_the_step_on_all(
    between: tuple[tuple[int, int], list[Any]],
) -> None:
    for found in between[1]:
        assert found["skipped"] == (True, 2.0**15)


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("bypass", "SetupError", "mark_forward_method('encode')"),
        (
            "forgotten",
            "SetupError",
            "all of 'norm.bias', 'norm.weight', of which they have computed different",
        ),
        ("tied", "SetupError", "'words.weight' and 'head.weight' of the Tied were one parameter"),
        ("returned", "WrongTypeError", "returned a int"),
        ("no plan", "SetupError", "it has no method parallelize(mesh)"),
        ("no function", "BrokenPluginError", "the option parallelize_fn cannot be loaded"),
    ],
)
def test_what_would_train_wrongly_is_refused(
    between: tuple[tuple[int, int], list[Any]], case: str, error: str, words: str
) -> None:
    for found in between[1]:
        name, message = found[case]
        assert name == error
        assert words in message


def test_a_norm_that_the_plan_names_passes_the_comparison(
    between: tuple[tuple[int, int], list[Any]],
) -> None:
    assert all(found["remembered"] is None for found in between[1])


def test_a_block_of_loss_parallel_inside_of_the_option_is_no_error(
    between: tuple[tuple[int, int], list[Any]],
) -> None:
    assert all(found["own block"] is None for found in between[1])


def test_closing_leaves_no_thread_of_a_group(between: tuple[tuple[int, int], list[Any]]) -> None:
    assert [found["threads"] for found in between[1]] == [0] * len(between[1])


def test_a_function_is_found_by_its_name(between: tuple[tuple[int, int], list[Any]]) -> None:
    assert all(found["by name"] is None for found in between[1])


def test_gradients_that_nothing_would_average_are_refused(
    between: tuple[tuple[int, int], list[Any]],
) -> None:
    (data, _), answers = between
    for found in answers:
        if data == 1:
            assert found["left out"] is None
        else:
            assert found["left out"][0] == "SetupError"
            assert "The gradients of 'norm.weight' would not be averaged" in found["left out"][1]


@pytest.mark.parametrize(
    ("asked", "world_size", "num_nodes", "sizes"),
    [
        (("auto", "auto"), 8, 2, (2, 4)),
        (("auto", "auto"), 1, 1, (1, 1)),
        ((2, "auto"), 8, 1, (2, 4)),
        (("auto", 2), 8, 1, (4, 2)),
        ((4, 2), 8, 1, (4, 2)),
    ],
)
def test_sizes_that_are_left_open_are_found(
    asked: tuple[Any, Any], world_size: int, num_nodes: int, sizes: tuple[int, int]
) -> None:
    axes = ("data_parallel", "tensor_parallel")
    found = axis_sizes(dict(zip(axes, asked, strict=True)), world_size, num_nodes)
    assert tuple(found.items()) == tuple(zip(axes, sizes, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"data_parallel_size": 2, "tensor_parallel_size": 4},
            r"data_parallel\(2\) \* tensor_parallel\(4\) != WORLD_SIZE\(6\)",
        ),
        ({"tensor_parallel_size": 4}, r"data_parallel\(1\) \* tensor_parallel\(4\) != WORLD_SIZE\(6\)"),
        ({"data_parallel_size": 0}, "takes a whole number from 1, or 'auto'"),
        ({"tensor_parallel_size": "all"}, "tensor_parallel_size='all' .* has to be a whole number or 'auto'"),
        ({"parallelize_fn": 3}, "parallelize_fn=3 .* has to be a text or a function or none"),
        ({"parallelise_fn": None}, "Did you mean 'parallelize_fn'"),
    ],
)
def test_sizes_and_options_that_do_not_fit_are_refused_before_anything_starts(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionsError, match=words):
        Fabric(accelerator="cpu", devices=6, strategy="tensor_parallel", strategy_options=options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel_size": "all"}, "tensor_parallel_size is 'all'"),
        ({"parallelize_fn": 3}, "takes a function of a module and a mesh"),
    ],
)
def test_the_class_refuses_them_by_itself(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionsError, match=words):
        Fabric(accelerator="cpu", devices=6, strategy=TensorParallelStrategy(**options))


def test_the_alias_names_the_same_strategy() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="model_parallel")
    assert isinstance(fabric.strategy, TensorParallelStrategy)


def test_float16_without_a_scaled_loss_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="16-true"):
        Fabric(accelerator="cpu", devices=2, strategy="tensor_parallel", precision="16-true")


def test_the_mesh_is_not_there_before_the_ranks_have_joined() -> None:
    with pytest.raises(SetupError, match=r"fabric.launch\(\) first"):
        _ = TensorParallelStrategy().mesh
    assert torch.distributed.is_initialized() is False
