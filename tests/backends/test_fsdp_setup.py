"""What comes before and around sharded training: models, optimizers and their order, on two real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PROGRAM = f"""
sys.path.insert(0, {str(Path(__file__).parent / "programs")!r})
from sharded_task import *
import copy, gc, pickle, warnings, weakref
from fabric_core.errors import FabricError

BLOCKS = {{"auto_wrap_policy": {{Block}}}}

def plain(model, optimizers, loss=mse_loss, clip=None, steps=STEPS):
    '''The same on one process, on the whole batches.'''
    for inputs, targets in zip(*(whole.split(8) for whole in batches(steps))):
        loss(model(inputs), targets).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {{name: value.clone() for name, value in model.state_dict().items()}}

def sharded(fabric, model, optimizers, steps=STEPS):
    for inputs, targets in loader(fabric, steps):
        fabric.backward(mse_loss(model(inputs), targets))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return whole(model.state_dict())

pairs, found = {{}}, {{}}  # what has to be equal, and everything else
"""

OPTIMIZERS = """
def halves(model):
    return [
        torch.optim.SGD([{"params": model.first.parameters(), "lr": 0.2}, {"params": model.blocks.parameters()}], 0.1),
        torch.optim.AdamW(model.last.parameters(), lr=0.01),
    ]

model = seeded()
expected = plain(model, halves(model))

with fabric_for(**BLOCKS) as fabric:
    model, *optimizers = fabric.setup(seeded(), *halves(raw := seeded()))
    found["optimizers of another model are left alone"] = all(
        not hasattr(p, "to_local") for o in optimizers for g in o.param_groups for p in g["params"])

for order in ("together", "before", "between"):
    with fabric_for(**BLOCKS) as fabric:
        model = seeded()
        if order == "together":
            model, *optimizers = fabric.setup(model, *halves(model))
        elif order == "before":
            optimizers = halves(model)
            model = fabric.setup_module(model)
            optimizers = fabric.setup_optimizers(*optimizers)
        else:
            model = fabric.setup_module(model)
            optimizers = fabric.setup_optimizers(*halves(model))
        pairs[order] = expected, sharded(fabric, model, optimizers)

# One optimizer of two models, which are set up one after the other.
class Pair(nn.Module):
    def __init__(self, one, two):
        super().__init__()
        self.one, self.two = one, two
    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))

def two():
    torch.manual_seed(3)
    return nn.Linear(5, 7), nn.Linear(7, 3)

both = Pair(*two())
expected = plain(both, [sgd(both)])
with fabric_for() as fabric:
    one, other = two()
    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1, momentum=0.9)
    first, optimizer = fabric.setup(one, optimizer)
    second = fabric.setup_module(other)
    for inputs, targets in loader(fabric):
        fabric.backward(mse_loss(second(torch.tanh(first(inputs))), targets))
        optimizer.step()
        optimizer.zero_grad()
    pairs["one optimizer of two models"] = expected, whole(Pair(first.module, second.module).state_dict())

# State that is there before: made by the constructor, or loaded.
adagrad = lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.1)
model = seeded()
expected = plain(model, [adagrad(model)])
with fabric_for(**BLOCKS) as fabric:
    model = seeded()
    model, optimizer = fabric.setup(model, adagrad(model))
    pairs["state of a constructor"] = expected, sharded(fabric, model, [optimizer])

adam = lambda model: torch.optim.Adam(model.parameters(), lr=0.01)
model = seeded()
optimizer = adam(model)
plain(model, [optimizer])
saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
expected = plain(model, [optimizer])
with fabric_for(**BLOCKS) as fabric:
    model = seeded(1)
    optimizer = adam(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    model, optimizer = fabric.setup(model, optimizer)
    pairs["state that was loaded"] = expected, sharded(fabric, model, [optimizer])

    class Odd(torch.optim.SGD):
        pass
    odd = Odd([p := nn.Parameter(torch.ones(4, 4))], lr=1)
    odd.state[p]["row"] = torch.ones(4)
    holder = nn.Linear(4, 4)
    holder.weight = p
    found["odd state"] = error_of(fabric.setup, holder, odd)
answer((pairs, found))
"""


def compare(answers: list[Any], name: str) -> None:
    for pairs, _ in answers:
        expected, weights = pairs[name]
        assert list(weights) == list(expected)
        for key, value in expected.items():
            assert (weights[key] - value).abs().max() <= 1e-6, (name, key)


@pytest.fixture(scope="module")
def optimizers(shared_programs: Any) -> list[Any]:
    return shared_programs.answers_of(PROGRAM + OPTIMIZERS)


@pytest.mark.parametrize(
    "name",
    [
        "together",
        "before",
        "between",
        "one optimizer of two models",
        "state of a constructor",
        "state that was loaded",
    ],
)
def test_optimizers_follow_the_shards_whenever_they_were_made(optimizers: list[Any], name: str) -> None:
    compare(optimizers, name)


def test_an_optimizer_of_other_parameters_is_left_alone(optimizers: list[Any]) -> None:
    assert all(found["optimizers of another model are left alone"] for _, found in optimizers)


def test_state_that_cannot_be_sharded_is_refused(optimizers: list[Any]) -> None:
    for _, found in optimizers:
        name, message = found["odd state"]
        assert name == "SetupError"
        assert "'row', of shape (4,)" in message
        assert "before the first step" in message


MODELS = """
class Tied(nn.Module):
    '''The weights of two blocks are one, and so are those of the first and the last layer.'''
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(3, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.decode = nn.Linear(3, 6)
        self.decode.weight = self.encode.weight
    def forward(self, x):
        x = self.encode(x[:, :3])
        for block in self.blocks:
            x = block(x)
        return nn.functional.linear(x, self.decode.weight.t())

def tied():
    torch.manual_seed(4)
    return Tied()

model = tied()
expected = plain(model, [sgd(model)])
for name, options in (("blocks", {"auto_wrap_policy": {Block}}), ("linear", {"auto_wrap_policy": {nn.Linear}})):
    with fabric_for(**options) as fabric:
        model = tied()
        model, optimizer = fabric.setup(model, sgd(model))
        found[f"still tied, {name}"] = model.encode.weight is model.decode.weight, len(list(model.parameters()))
        pairs[f"tied weights, {name}"] = expected, sharded(fabric, model, [optimizer])

# Part of a unit is frozen, and part of it is trained.
def frozen(model):
    for block in model.blocks:
        block.up.requires_grad_(False)
    model.first.bias.requires_grad_(False)
    return model
model = frozen(seeded())
expected = plain(model, [sgd(model)])
for every in (1, 2):
    with fabric_for(**BLOCKS) as fabric:
        model = frozen(seeded())
        model, optimizer = fabric.setup(model, sgd(model))
        found["frozen"] = [[p.requires_grad for p in one.parameters()] for one in (model, frozen(seeded()))]
        if every == 1:
            pairs["frozen parts"] = expected, sharded(fabric, model, [optimizer])
        else:
            loop(fabric, model, optimizer, every=2)

# Nothing is trained at all; buffers come from rank 0, also those of a dtype that no backend reduces.
with fabric_for() as fabric:
    model = seeded(7 + rank).requires_grad_(False)
    model.offset += rank
    model.register_buffer("mask", torch.tensor([rank == 0, True]))
    model.register_buffer("steps", torch.tensor(rank))
    model = fabric.setup(model)
    expected = seeded()
    pairs["inference"] = {"out": expected(batches(1)[0]).detach()}, {"out": model(batches(1)[0])}
    found["buffers"] = model.mask.tolist(), model.steps.item()

# A GAN: two models, two optimizers, and each loss goes through both.
def gan():
    torch.manual_seed(5)
    return [nn.Sequential(nn.Linear(first, 8), nn.ReLU(), nn.Linear(8, last)) for first, last in ((5, 3), (3, 1))]

def play(generator, critic, optimizers, backward, rounds):
    of_generator, of_critic = optimizers
    for noise, real in rounds:
        fake = generator(noise)
        backward(critic(fake.detach()).mean() - critic(real).mean() + critic(real).square().mean())
        of_critic.step()
        of_critic.zero_grad()
        backward(-critic(fake).mean() + fake.square().mean())
        of_generator.step()
        of_generator.zero_grad()
        of_critic.zero_grad()

generator, critic = gan()
rounds = zip(*(whole.split(8) for whole in batches()))
play(generator, critic, [sgd(generator), sgd(critic)], lambda loss: loss.backward(), rounds)
expected = dict(nn.ModuleList([generator, critic]).state_dict())
with fabric_for(min_parameters=10) as fabric:
    generator, critic = gan()
    generator, of_generator = fabric.setup(generator, sgd(generator))
    critic, of_critic = fabric.setup(critic, sgd(critic))
    play(generator, critic, [of_generator, of_critic], fabric.backward, loader(fabric))
    pairs["a GAN"] = expected, whole(nn.ModuleList([generator.module, critic.module]).state_dict())

# Compiled before, and in place.
model = seeded()
expected = plain(model, [sgd(model)])
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the compiler's own
    for how in ("around", "in place"):
        with fabric_for(**BLOCKS) as fabric:
            raw = seeded()
            optimizer = sgd(raw)
            if how == "in place":
                raw.compile(backend="eager")
            model, optimizer = fabric.setup(torch.compile(raw, backend="eager") if how == "around" else raw, optimizer)
            pairs[f"compiled {how}"] = expected, sharded(fabric, model, [optimizer])
        torch._dynamo.reset()
answer((pairs, found))
"""


@pytest.fixture(scope="module")
def models(shared_programs: Any) -> list[Any]:
    return shared_programs.answers_of(PROGRAM + MODELS, timeout=110)


@pytest.mark.parametrize(
    "name",
    [
        "tied weights, blocks",
        "tied weights, linear",
        "frozen parts",
        "inference",
        "a GAN",
        "compiled around",
        "compiled in place",
    ],
)
def test_models_of_every_kind_train_as_they_do_on_one_process(models: list[Any], name: str) -> None:
    compare(models, name)


def test_weights_that_a_model_shares_stay_one(models: list[Any]) -> None:
    for _, found in models:
        assert found["still tied, blocks"] == found["still tied, linear"] == (True, 20)


def test_frozen_parameters_stay_frozen(models: list[Any]) -> None:
    for _, found in models:
        assert found["frozen"][0] == found["frozen"][1]


def test_every_rank_gets_the_buffers_of_rank_0(models: list[Any]) -> None:
    for _, found in models:
        assert found["buffers"] == ([True, True], 0)
