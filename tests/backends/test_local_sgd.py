"""Local SGD on real processes, against a plain PyTorch loop that plays both ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from fabric_backends.strategies.local_sgd import LocalSGDStrategy
from fabric_core.errors import OptionsError

TOLERANCE = 1e-6

TASK = """
import torch
from torch.nn.functional import mse_loss

def net(seed=7):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))

def batch(step, rank):
    generator = torch.Generator().manual_seed(1000 + step)
    inputs, targets = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
    return inputs[rank::2], targets[rank::2]

def optimizers(model):
    return [
        torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9),
        torch.optim.AdamW(model[2].parameters(), lr=0.01),
    ]

def weights(model):
    return [value.detach().clone() for value in model.state_dict().values()]

def momentum(optimizer):
    return [state["momentum_buffer"].clone() for state in optimizer.state.values()]
"""

TRAINING = (
    TASK
    + """
from fabric_backends.strategies import local_sgd
from fabric_core import Fabric

def train(steps=14, every=1, precision="32-true", **options):
    fabric = Fabric(
        accelerator="cpu", devices=world, strategy="local_sgd", precision=precision, strategy_options=options
    )
    with fabric:
        model = net(7 + rank)
        model, *trained = fabric.setup(model, *optimizers(model))
        seen, untouched = [], None
        for step in range(steps):
            inputs, targets = batch(step, rank)
            with fabric.accumulate(model, every=every):
                overflows = precision == "16-mixed" and (rank, step) == (1, 1)
                fabric.backward(mse_loss(model(inputs), targets) * (float("inf") if overflows else 1.0))
                for number, optimizer in enumerate(trained):
                    if number == 0 or step % 2 == 0 or every > 1:  # the second one steps half as often
                        optimizer.step()
                for optimizer in trained:
                    optimizer.zero_grad()
            seen.append(weights(model))
            if step == 8:
                before = weights(model)
                fabric.save("middle", {"model": model, "optimizers": trained})
                untouched = all(torch.equal(a, b) for a, b in zip(before, weights(model)))
        return seen, momentum(trained[0]), untouched

found = {
    "alone": train(sync_every=3),
    "after a warm-up": train(sync_every=4, warmup_steps=4),
    "accumulating": train(sync_every=2, every=3),
    "in half": train(sync_every=3, precision="16-mixed")[0],
}
fabric = Fabric(accelerator="cpu", devices=world, strategy="local_sgd", strategy_options={"sync_every": 3})
with fabric:
    model = net(7 + rank)
    wrapped, *_ = fabric.setup(model, *optimizers(model))
    found["forward module is the user's"] = wrapped._fabric_forward_module is model
    local_sgd._AT_ONCE = 20
    mixed = [torch.nn.Parameter(torch.full((n,), float(rank + 1), dtype=d)) for n, d in
             ((30, torch.float32), (1, torch.float64), (5, torch.float64), (2, torch.bfloat16), (40, torch.float32))]
    frozen = torch.nn.Parameter(torch.full((2,), float(rank)), requires_grad=False)
    addresses = [p.data_ptr() for p in mixed]
    local_sgd.average_([*mixed, frozen])
    found["averaged"] = [(p.unique().tolist(), p.dtype) for p in mixed], frozen.tolist()
    found["in place"] = addresses == [p.data_ptr() for p in mixed]

train(sync_every=4, warmup_steps=4)  # its file has a warm-up behind it
found["file"] = torch.load("middle")
four = {"sync_every": 4, "warmup_steps": 4}
with Fabric(accelerator="cpu", devices=world, strategy="local_sgd", strategy_options=four) as fabric:
    model = net(rank)
    model, *trained = fabric.setup(model, *optimizers(model))
    fabric.load("middle", {"model": model, "optimizers": trained})
    found["loaded"] = weights(model)
    inputs, targets = batch(9, rank)
    fabric.backward(mse_loss(model(inputs), targets))
    found["gradient"] = [p.grad.clone() for p in model.parameters()]
with Fabric(accelerator="cpu", devices=world, strategy="ddp") as fabric:
    model = net(rank)
    model, *trained = fabric.setup(model, *optimizers(model))
    fabric.load("middle", {"model": model, "optimizers": trained})
    found["loaded by ddp"] = weights(model)
answer(found)
"""
)


@pytest.fixture(scope="module")
def task() -> dict[str, Any]:
    scope: dict[str, Any] = {}
    with torch.random.fork_rng():
        exec(TASK, scope)
    return scope


@pytest.fixture(scope="module")
def trained(shared_programs: Any) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = shared_programs.answers_of(TRAINING, timeout=110)
    return answers


class Plain:
    """Both ranks in one process."""

    def __init__(self, task: dict[str, Any], sync_every: int, warmup: int = 0) -> None:
        self.task, self.sync_every, self.warmup = task, sync_every, warmup
        with torch.random.fork_rng():
            self.models = [task["net"](), task["net"]()]
        self.optimizers = [task["optimizers"](model) for model in self.models]
        self.alone = [0, 0]  # steps of each optimizer since the warm-up
        self.together = 0

    def run(self, steps: int = 14, every: int = 1) -> list[list[list[torch.Tensor]]]:
        """The weights of both ranks after each micro-batch."""
        seen = []
        for step in range(steps):
            for rank, model in enumerate(self.models):
                inputs, targets = self.task["batch"](step, rank)
                window = min(every, steps - step // every * every)
                (mse_loss(model(inputs), targets) / window).backward()
            if (step + 1) % every == 0 or step + 1 == steps:
                self.step(both=step % 2 == 0 or every > 1)
            seen.append([self.task["weights"](model) for model in self.models])
        return seen

    def step(self, both: bool) -> None:
        warming_up = self.together < self.warmup
        if warming_up:
            for one, other in zip(*(model.parameters() for model in self.models), strict=True):
                one.grad = other.grad = (one.grad + other.grad) / 2
        for number in range(2 if both else 1):
            for rank in range(2):
                self.optimizers[rank][number].step()
            if not warming_up:
                self.alone[number] += 1
                if self.alone[number] % self.sync_every == 0:
                    self.average(number)
        self.together += warming_up
        for model in self.models:
            model.zero_grad()

    @torch.no_grad()
    def average(self, number: int) -> None:
        for one, other in zip(*(model[2 * number].parameters() for model in self.models), strict=True):
            average = (one + other) / 2
            one.copy_(average)
            other.copy_(average)


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], what: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= TOLERANCE, what


@pytest.mark.parametrize(
    ("how", "options"),
    [("alone", {"sync_every": 3}), ("after a warm-up", {"sync_every": 4, "warmup": 4})],
)
def test_ranks_step_alone_and_meet_every_few_steps(
    trained: list[dict[str, Any]], task: dict[str, Any], how: str, options: dict[str, int]
) -> None:
    plain = Plain(task, **options)
    expected = plain.run()
    for rank, found in enumerate(trained):
        weights, momentum, _ = found[how]
        for step, at in enumerate(expected):
            assert_close(weights[step], at[rank], (how, rank, step))
        assert_close(momentum, task["momentum"](plain.optimizers[rank][0]), "momentum")
    apart = [max((a - b).abs().max() for a, b in zip(*at, strict=True)).item() for at in expected]
    assert max(apart) > 1e-3  # they really were alone
    one, other = (found[how][1] for found in trained)
    assert any(
        (a - b).abs().max() > 1e-4 for a, b in zip(one, other, strict=True)
    )  # momentum stays each rank's own


def test_a_step_is_counted_at_the_end_of_a_window(
    trained: list[dict[str, Any]], task: dict[str, Any]
) -> None:
    expected = Plain(task, 2).run(steps=12, every=3)
    for rank, found in enumerate(trained):
        for step in range(12):
            assert_close(found["accumulating"][0][step], expected[step][rank], (rank, step))


def test_a_step_that_one_rank_skips_counts_all_the_same(trained: list[dict[str, Any]]) -> None:
    for step in (2, 5, 8):
        one, other = (found["in half"][step][0] for found in trained)
        assert torch.equal(one, other)
    skipped, taken = (torch.equal(found["in half"][0][0], found["in half"][1][0]) for found in trained[::-1])
    assert (skipped, taken) == (True, False)
    one, other = (found["in half"][3][0] for found in trained)
    assert not torch.equal(one, other)


def test_a_checkpoint_holds_the_average_and_leaves_the_ranks_alone(
    trained: list[dict[str, Any]], task: dict[str, Any]
) -> None:
    at = Plain(task, 4, 4).run()[8]
    average = [(one + other) / 2 for one, other in zip(*at, strict=True)]
    for found in trained:
        assert found["after a warm-up"][2] is True
        assert_close(list(found["file"]["model"].values()), average, "file")
        assert_close(found["loaded"], average, "loaded")
        assert_close(found["loaded by ddp"], average, "loaded by ddp")
    assert [o["local_sgd"] for o in trained[0]["file"]["optimizers"]] == [
        {"together": 4, "alone": 5},
        {"together": 2, "alone": 3},
    ]


def test_a_warm_up_that_is_over_stays_over(trained: list[dict[str, Any]], task: dict[str, Any]) -> None:
    for rank, found in enumerate(trained):
        model = task["net"]()
        model.load_state_dict(found["file"]["model"])
        inputs, targets = task["batch"](9, rank)
        mse_loss(model(inputs), targets).backward()
        assert_close(found["gradient"], [p.grad for p in model.parameters()], rank)


def test_parameters_are_averaged_in_place_whatever_their_dtype(trained: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(trained):
        averaged, frozen = found["averaged"]
        assert [values for values, _ in averaged] == [[1.5]] * 5
        assert frozen == [rank, rank]
        assert found["in place"]
        assert found["forward module is the user's"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sync_every": 0}, "sync_every=0 cannot be used. It takes a whole number from 1"),
        ({"sync_every": 2.5}, "sync_every=2.5"),
        ({"warmup_steps": -1}, "a whole number from 0"),
        ({"warmup": 3}, "The strategy 'local_sgd' has no option 'warmup'. Did you mean 'warmup_steps'?"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionsError) as caught:
        LocalSGDStrategy(**options)
    assert words in str(caught.value)
