"""How ddp sends gradients, and batch normalisation over all ranks, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from fabric_backends.batchnorm import synchronize_batchnorm
from fabric_backends.strategies.ddp import DDPStrategy
from fabric_core.errors import OptionsError, UnsupportedError

STEPS = 12

TASK = """
import torch
from torch.nn.functional import mse_loss

class Net(torch.nn.Module):
    # (N, 6) to (N, 3); of the two branches a step uses one.
    def __init__(self):
        super().__init__()
        self.first, self.odd, self.even = torch.nn.Linear(6, 16), torch.nn.Linear(16, 3), torch.nn.Linear(16, 3)

    def forward(self, x, odd=True):
        return (self.odd if odd else self.even)(torch.tanh(self.first(x)))

def net(seed=7):
    torch.manual_seed(seed)
    return Net()

def batch(step, rank=None):
    generator = torch.Generator().manual_seed(1000 + step)
    inputs, targets = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
    return (inputs, targets) if rank is None else (inputs[rank::2], targets[rank::2])
"""

SENDING = f"""
{TASK}

def train(every=1, branches=False, **options):
    strategy = connected(**options)
    model = net()
    if not branches:
        model.even.requires_grad_(False)
    wrapped = strategy.setup_module(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range({STEPS}):
        inputs, targets = batch(step, rank)
        full = (step + 1) % every == 0
        with strategy.accumulation_context(wrapped, full):
            odd = not branches or step % 2 == 0
            strategy.backward(mse_loss(wrapped(inputs, odd), targets) / every, wrapped)
        if full:
            optimizer.step()
            optimizer.zero_grad()
    weights = {{name: value.clone() for name, value in model.state_dict().items()}}
    strategy.teardown()
    return weights

def counting(state, bucket):
    state.append(bucket.buffer().numel())
    summed = dist.all_reduce(bucket.buffer().div_(world), async_op=True).get_future()
    return summed.then(lambda future: future.value()[0])

def refused(**options):
    strategy = connected(**options)
    result = error_of(strategy.setup_module, torch.nn.Linear(2, 1))
    strategy.teardown()
    return result

def without_a_bucket(state):
    pass

calls = []
late = {{"start_powerSGD_iter": 1000}}
whole = {{"matrix_approximation_rank": 6, "start_powerSGD_iter": 2, "min_compression_rate": 0}}
rough = {{"matrix_approximation_rank": 1, "start_powerSGD_iter": 2, "min_compression_rate": 0}}
answer({{
    "whole": train(),
    "fp16": train(comm_hook="fp16"),
    "fp16, accumulating": train(comm_hook="fp16", every=3),
    "powersgd, warming up": train(comm_hook="powersgd", comm_state=late),
    "powersgd, warming up, fp16": train(comm_hook="powersgd", comm_state=late, comm_wrapper="fp16"),
    "powersgd of full rank": train(comm_hook="powersgd", comm_state=whole),
    "powersgd of rank 1": train(comm_hook="powersgd", comm_state=rough),
    "the user's own": train(comm_hook=counting, comm_state=calls),
    "branches": train(branches=True, find_unused_parameters=True),
    "calls": calls,
    "bf16": refused(comm_hook="bf16"),
    "wrapped in bf16": refused(comm_hook="powersgd", comm_wrapper="bf16"),
    "no hook": refused(comm_hook=without_a_bucket),
    "batchnorm": error_of(
        connected(sync_batchnorm=True).setup_module, torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    ),
}})
"""


def whole(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one + other) / 2


def in_half(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """What the hook does: each rank rounds its gradient to float16 and divides; the sum is in float16 as well."""
    return (one.half() / 2 + other.half() / 2).float()


def plain(
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = whole,
    every: int = 1,
    branches: bool = False,
) -> dict[str, torch.Tensor]:
    """Both ranks in one process: the gradients of each half of a batch, combined."""
    scope: dict[str, Any] = {}
    with torch.random.fork_rng():
        exec(TASK, scope)
        model = scope["net"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for begin in range(0, STEPS, every):
        parts = []
        for rank in range(2):
            for step in range(begin, begin + every):
                inputs, targets = scope["batch"](step, rank)
                odd = not branches or step % 2 == 0
                (mse_loss(model(inputs, odd), targets) / every).backward()
            parts.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
            model.zero_grad()
        for parameter, one, other in zip(model.parameters(), *parts, strict=True):
            parameter.grad = None if one is None else combine(one, other)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def sent(shared_programs: Any) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = shared_programs.answers_of(SENDING, timeout=110)
    return answers


def difference(sent: list[dict[str, Any]], how: str, expected: dict[str, torch.Tensor]) -> float:
    for name in expected:
        assert torch.equal(sent[0][how][name], sent[1][how][name]), (how, name)
    return max(float((sent[0][how][name] - value).abs().max()) for name, value in expected.items())


ROUNDING = 1e-6  # of float32 sums
# A last bit of float32 may round a float16 the other way: 2**-11 of a gradient around 0.5, times lr / (1 - momentum).
HALF = 2e-4


@pytest.mark.parametrize(
    ("how", "options", "tolerance"),
    [
        ("whole", {}, ROUNDING),
        ("the user's own", {}, ROUNDING),
        ("powersgd, warming up", {}, ROUNDING),
        ("fp16", {"combine": in_half}, HALF),
        ("fp16, accumulating", {"combine": in_half, "every": 3}, HALF),
        ("powersgd, warming up, fp16", {"combine": in_half}, HALF),
        ("powersgd of full rank", {}, 1e-4),  # products of orthogonal matrices in float32, 12 times
        ("branches", {"branches": True}, ROUNDING),
    ],
)
def test_gradients_arrive_as_a_plain_loop_has_them(
    sent: list[dict[str, Any]], how: str, options: dict[str, Any], tolerance: float
) -> None:
    assert difference(sent, how, plain(**options)) <= tolerance


def test_compression_really_takes_place(sent: list[dict[str, Any]]) -> None:
    exact = plain()
    assert difference(sent, "fp16", exact) > 2 * ROUNDING
    assert difference(sent, "fp16, accumulating", plain(every=3)) > 2 * ROUNDING
    moved = max(float((exact[name] - value).abs().max()) for name, value in plain_start().items())
    assert 1e-3 < difference(sent, "powersgd of rank 1", exact) < moved  # rough, and on its way all the same


def plain_start() -> dict[str, torch.Tensor]:
    scope: dict[str, Any] = {}
    with torch.random.fork_rng():
        exec(TASK, scope)
        return dict(scope["net"]().state_dict())


def test_a_hook_of_the_users_own_gets_its_state_and_every_gradient(sent: list[dict[str, Any]]) -> None:
    for found in sent:
        assert sum(found["calls"]) == STEPS * (6 * 16 + 16 + 16 * 3 + 3)


@pytest.mark.parametrize("how", ["bf16", "wrapped in bf16", "no hook"])
def test_a_hook_that_cannot_work_here_is_one_clear_error_at_setup(
    sent: list[dict[str, Any]], how: str
) -> None:
    for found in sent:
        name, message = found[how]
        assert name == "UnsupportedError"
        assert "Leave comm_hook out, or use another one; by name there are bf16, fp16, powersgd" in message
        assert ("BF16 all reduce" in message) == (how != "no hook")


def test_batchnorm_cannot_be_synchronised_on_the_cpu(sent: list[dict[str, Any]]) -> None:
    for found in sent:
        name, message = found["batchnorm"]
        assert name == "UnsupportedError"
        assert "sync_batchnorm=True needs devices on which PyTorch has SyncBatchNorm" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"comm_hook": "fp61"},
            "There is no comm_hook='fp61'. Did you mean 'fp16'? It takes bf16, fp16, powersgd",
        ),
        ({"comm_hook": "powersgd", "comm_wrapper": "fp8"}, "There is no comm_wrapper='fp8'."),
        ({"comm_hook": "fp16", "comm_state": {"rank": 2}}, "comm_hook='fp16' has no state"),
        ({"comm_wrapper": "fp16"}, "belong to a comm_hook, and none was asked for"),
        ({"comm_hook": "powersgd", "comm_state": {"rank": 2}}, "has no option 'rank'"),
        ({"comm_hook": "powersgd", "comm_state": {"start_powerSGD_iter": 1}}, "refuses comm_state"),
        ({"comm_hook": "powersgd", "comm_state": 4}, "takes a dictionary of the options of its state"),
    ],
)
def test_a_hook_that_does_not_exist_or_does_not_take_its_state_is_refused(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionsError) as caught:
        DDPStrategy(**options)
    assert words in str(caught.value)


def normalised() -> Any:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)
    )
    model.norms = [model[1], model[4]]  # as a user's class may keep them
    return model


def test_batchnorm_becomes_synchronised_in_place() -> None:
    """On a stand-in for a GPU; only the layers' class is looked at."""
    model = normalised()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    layers, hooked = (model[1], model[4]), []
    model[1].register_forward_hook(lambda *_: hooked.append(1))
    synchronize_batchnorm(model, torch.device("cuda"), 2)
    assert [type(layer) for layer in layers] == [nn.SyncBatchNorm] * 2
    assert (model[1], model[4]) == layers == tuple(model.norms)
    assert len(model[1]._forward_hooks) == 1
    for name, value in model.state_dict(keep_vars=True).items():
        assert (id(value), True) == (before[name][0], torch.equal(value, before[name][1]))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    model.eval()(torch.ones(2, 1, 4, 4))  # with running statistics, which need no other rank
    assert hooked


def test_one_rank_has_nothing_to_synchronise_and_no_layer_is_no_mistake() -> None:
    model = normalised()
    synchronize_batchnorm(model, torch.device("cpu"), 1)
    assert type(model[1]) is nn.BatchNorm2d
    synchronize_batchnorm(nn.Linear(2, 1), torch.device("cpu"), 2)


def test_a_batchnorm_with_a_forward_pass_of_its_own_is_named() -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    model = nn.Sequential(nn.BatchNorm1d(3), Own(3))
    with pytest.raises(UnsupportedError, match="'1' is a Own with a forward pass of its own"):
        synchronize_batchnorm(model, torch.device("cuda"), 2)
    assert type(model[0]) is nn.BatchNorm1d


ENDING = """
from fabric_backends import process_group

process_group._TIME_TO_REST = 10.0
for _ in range(40):
    strategy = connected(comm_hook="powersgd", comm_state={"start_powerSGD_iter": 2, "min_compression_rate": 0})
    wrapped = strategy.setup_module(torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Linear(16, 3)))
    for _ in range(4):
        wrapped(torch.ones(4, 6)).sum().backward()
    began = time.monotonic()
    strategy.teardown()
    assert time.monotonic() - began < 5.0, "it waited in vain"
answer(True)
"""


def test_closing_outlasts_the_hooks_that_run_in_threads_of_the_group(programs: Any) -> None:
    """Otherwise the process is aborted now and then: the thread of a hook would end the group, and so itself."""
    assert programs.answers_of(ENDING) == [True, True]


ON_ONE_GPU = """
torch.manual_seed(7)
model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # made before the conversion
strategy = DDPStrategy(sync_batchnorm=True, process_group_backend="gloo")
parts = CPUAccelerator(), FullPrecision(), LocalEnvironment(), TorchFile()
gpu = torch.device("cuda", 0)
strategy.attach(Surroundings(*parts, (gpu,) * world, world, 1))
strategy.connect()
strategy.move_module(model)
wrapped = strategy.setup_module(model)
inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
for _ in range(5):
    wrapped(inputs[rank::2].to(gpu)).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
answer({name: value.cpu() for name, value in model.state_dict().items()})
strategy.teardown()
"""


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a GPU")
def test_two_ranks_normalise_as_one_process_does_over_the_whole_batch(programs: Any) -> None:
    answers = programs.answers_of(ON_ONE_GPU, timeout=110)
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        model(inputs).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in answers:
        for name, value in model.state_dict().items():
            assert (found[name] - value).abs().max() < 1e-5, name
