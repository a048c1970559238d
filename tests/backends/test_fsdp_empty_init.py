"""Models that are created without memory, and get it shard by shard, on two real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

PROGRAM = f"""
sys.path.insert(0, {str(Path(__file__).parent / "programs")!r})
from sharded_task import *
import warnings

BLOCKS = {{"auto_wrap_policy": {{Block}}}}
found = {{}}

class Ranked(nn.Module):
    '''Its own values depend on the rank; the layers inside follow PyTorch.'''
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(3))
        self.register_buffer("table", torch.empty(2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long), persistent=False)
        self.block, self.norm = Block(), nn.BatchNorm1d(6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.attention.out_proj.weight
        self.reset_parameters()
    def reset_parameters(self):
        nn.init.constant_(self.scale, 1.0 + rank)
        self.table.fill_(2.0 + rank)
        self.steps.zero_()
    def forward(self, x):
        x = self.norm(self.block(x))
        return self.tied(self.attention(x, x, x)[0]) * self.scale.sum() + self.table.sum()

for precision in ("32-true", "bf16-true"):
    with fabric_for(precision=precision, **BLOCKS) as fabric:
        with fabric.init_module(empty_init=True):
            model = Ranked()
        found[f"before, {{precision}}"] = {{(t.is_meta, t.dtype) for t in (*model.parameters(), *model.buffers())}}
        torch.manual_seed(11)
        model = fabric.setup(model)
        found[f"after, {{precision}}"] = whole(model.state_dict())
        found["tied"] = model.tied.weight is model.attention.out_proj.weight
        fabric.backward(model(torch.randn(4, 6)).sum())
        with fabric.init_module():
            plain = nn.Linear(2, 2)
        found[f"with values, {{precision}}"] = plain.weight.device.type, plain.weight.dtype

# What does not depend on the rank is what the same seed gives in one piece.
torch.manual_seed(11)
found["one piece"] = dict(Block().state_dict())
with fabric_for() as fabric:
    with fabric.init_module(empty_init=True):
        model = Block()
    torch.manual_seed(11)
    found["in shards"] = whole(fabric.setup(model).state_dict())

class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.inside = nn.Parameter(torch.ones(4, 4)), nn.Linear(4, 4)
    def forward(self, x):
        return self.inside(x @ self.weight)

with fabric_for() as fabric:
    model = fabric.setup(bare := Bare())
    fabric.save("bare", {{"model": model}})
    values = whole(model.state_dict())
    with fabric.init_module(empty_init=True):
        empty = Bare()
    optimizer_error = error_of(fabric.setup, empty, sgd(empty))
    found["optimizer"] = optimizer_error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = fabric.setup(empty)
    found["warning"] = [str(warning.message) for warning in caught]
    inside = whole(model.state_dict())["inside.weight"]
    found["undefined"] = model(torch.ones(2, 4)).isnan().all().item(), inside.isnan().any().item()
    optimizer = fabric.setup_optimizers(sgd(model))
    fabric.load("bare", {{"model": model}})
    found["loaded"] = values, whole(model.state_dict())
    fabric.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
answer(found)
"""


@pytest.fixture(scope="module")
def created(shared_programs: Any) -> list[dict[str, Any]]:
    return shared_programs.answers_of(PROGRAM)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)])
def test_a_model_without_memory_gets_values_that_are_the_same_on_every_rank(
    created: list[dict[str, Any]], precision: str, dtype: torch.dtype
) -> None:
    for found in created:
        assert found[f"before, {precision}"] == {(True, dtype), (True, torch.int64)}
        weights = found[f"after, {precision}"]
        assert weights["scale"].tolist() == [1, 1, 1]
        assert weights["table"].tolist() == [2, 2]
        assert weights["norm.weight"].tolist() == [1] * 6
        assert weights["norm.running_var"].tolist() == [1] * 6
        assert weights["attention.in_proj_bias"].tolist() == [0] * 18
        assert weights["attention.in_proj_weight"].std() > 0.1
        for key, value in created[0][f"after, {precision}"].items():
            assert torch.equal(weights[key], value)
            assert value.isfinite().all()
        assert found["tied"] is True
        assert found[f"with values, {precision}"] == ("cpu", dtype)


def test_the_values_are_those_of_a_model_that_is_created_in_one_piece(created: list[dict[str, Any]]) -> None:
    for found in created:
        for key, value in found["one piece"].items():
            assert torch.equal(found["in shards"][key], value)


def test_modules_that_cannot_give_values_are_named_and_filled_with_nan(created: list[dict[str, Any]]) -> None:
    for found in created:
        (message,) = found["warning"]
        assert "Bare has no method reset_parameters()" in message
        assert found["undefined"] == (True, False)


def test_a_checkpoint_is_loaded_into_it(created: list[dict[str, Any]]) -> None:
    for found in created:
        expected, weights = found["loaded"]
        for key, value in expected.items():
            assert torch.equal(weights[key], value)


def test_an_optimizer_of_parameters_without_memory_is_refused(created: list[dict[str, Any]]) -> None:
    for found in created:
        name, message = found["optimizer"]
        assert name == "SetupError"
        assert "setup_module" in message
