"""Distributed data parallel on real processes, against a plain PyTorch loop."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

from fabric_backends.strategies.ddp import DDPStrategy
from fabric_core.contracts.strategy import Surroundings
from fabric_core.errors import OptionsError, SetupError
from fabric_core.parts.cpu import CPUAccelerator
from fabric_core.parts.full_precision import FullPrecision
from fabric_core.parts.local import LocalEnvironment
from fabric_core.parts.torch_file import TorchFile

STEPS = 20

TASK = """
def model():
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))

def seeded_model():
    torch.manual_seed(7)
    return model()

def batch(step):
    torch.manual_seed(1000 + step)
    return torch.randn(8, 6), torch.randn(8, 3)
"""

TRAINING = f"""
{TASK}
from contextlib import nullcontext

views = {{True: True, False: True}}

def train(every=1, set_to_none=True, **options):
    strategy = connected(**options)
    torch.manual_seed(7 + rank)  # only rank 0 has the weights of the plain loop
    net = strategy.setup_module(model())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range({STEPS}):
        inputs, targets = (whole[rank * 4 : rank * 4 + 4] for whole in batch(step))
        full = (step + 1) % every == 0
        with nullcontext() if full else strategy.hold_gradient_sync(net):
            loss = torch.nn.functional.mse_loss(net(inputs), targets) / every
            strategy.backward(loss, net)
        if full:
            optimizer.step()
            views[options.get("gradient_as_bucket_view", True)] &= net.module[0].weight.grad._is_view()
            optimizer.zero_grad(set_to_none)
    weights = {{name: value.clone() for name, value in net.module.state_dict().items()}}
    strategy.teardown()
    return weights

answer({{
    "plainly": train(),
    "accumulating": train(every=4),
    "with gradients that are set to zero": train(every=2, set_to_none=False),
    "looking for unused parameters": train(find_unused_parameters=True),
    "with a static graph": train(static_graph=True, gradient_as_bucket_view=False),
    "in small buckets": train(bucket_cap_mb=0.0001, broadcast_buffers=False),
    "accumulating, without views": train(every=4, gradient_as_bucket_view=False, skip_all_reduce_unused_params=False),
    "views": views,
}})

strategy = connected()  # never to be closed
net = strategy.setup_module(torch.nn.Linear(2, 1))
net(torch.ones(1, 2)).sum().backward()
strategy.barrier()
"""


def plain_loop(every: int) -> dict[str, torch.Tensor]:
    """The training of both ranks on one process: plain PyTorch on the whole batch."""
    scope: dict[str, Any] = {"torch": torch}
    exec(TASK, scope)
    model = scope["seeded_model"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        inputs, targets = scope["batch"](step)
        (nn.functional.mse_loss(model(inputs), targets) / every).backward()
        if (step + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def training(shared_programs: Any) -> Any:
    return shared_programs.on_ranks(TRAINING, TORCH_CPP_LOG_LEVEL="ERROR")  # ddp warns of a flag in vain


@pytest.fixture
def trained(training: Any) -> list[dict[str, Any]]:
    assert sorted(training.answers) == [0, 1], training.err
    return [training.answers[0], training.answers[1]]


def test_a_process_that_never_closes_ends_without_a_word(training: Any) -> None:
    assert (training.code, training.err) == (0, "")


@pytest.mark.parametrize(
    ("how", "every"),
    [
        ("plainly", 1),
        ("accumulating", 4),
        ("with gradients that are set to zero", 2),
        ("looking for unused parameters", 1),
        ("with a static graph", 1),
        ("in small buckets", 1),
        ("accumulating, without views", 4),
    ],
)
def test_two_ranks_train_as_one_process_does_on_the_whole_batch(
    trained: list[dict[str, Any]], how: str, every: int
) -> None:
    with torch.random.fork_rng():
        expected = plain_loop(every)
    for weights in trained:
        for name, value in expected.items():
            assert (weights[how][name] - value).abs().max() <= 1e-6, (how, name)
    for name in expected:
        assert torch.equal(trained[0][how][name], trained[1][how][name])


def test_gradients_lie_where_they_are_sent_from_unless_they_are_not_to(trained: list[dict[str, Any]]) -> None:
    assert [weights["views"] for weights in trained] == [{True: True, False: False}] * 2


LISTENING = """
def listening():
    folder = "/proc/self/fd/"
    mine = {os.readlink(folder + fd) for fd in os.listdir(folder) if os.path.lexists(folder + fd)}
    rows = [row.split() for name in ("tcp", "tcp6") for row in open(f"/proc/self/net/{name}").readlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]
"""


LIFE = """
found = {"hook": sys.excepthook is sys.__excepthook__, "threads": threads()}
strategy = connected()
torch.manual_seed(rank)
net = strategy.setup_module(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5)))
loss = net(torch.ones(2, 3)).sum()
loss.backward()
strategy.teardown()
strategy.teardown()
found["threads afterwards"] = threads()
found["hook afterwards"] = sys.excepthook is sys.__excepthook__
found["training afterwards"] = error_of(net, torch.ones(2, 3))
with torch.no_grad():
    found["without gradients"] = net(torch.ones(2, 3)).shape
net.eval()
found["inference"] = torch.equal(net(torch.ones(2, 3)), net.module(torch.ones(2, 3)))
found["state"] = list(net.state_dict())

# A second life in the same process, with another group and a module without anything to train.
strategy = connected()
torch.manual_seed(rank)
frozen = torch.nn.BatchNorm1d(3).requires_grad_(False)
torch.nn.init.normal_(frozen.weight)
frozen.running_mean += rank + 1
kept = strategy.setup_module(frozen)
found["frozen"] = kept is frozen, frozen.weight.tolist(), frozen.running_mean.tolist()
with strategy.hold_gradient_sync(kept):
    found["sum"] = strategy.all_reduce(torch.tensor(rank + 1), "sum").item()

# Two strategies share a group; the last one to go takes it along.
other = connected()
strategy.teardown()
found["shared"] = other.all_reduce(torch.tensor(1), "sum").item()
other.teardown()
found["group afterwards"] = dist.is_initialized()

# A group that the user has made is used, and left alone.
store = dist.PrefixStore("mine", attached(DDPStrategy()).store)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
strategy = connected()
found["on the user's group"] = strategy.all_reduce(torch.tensor(1), "sum").item()
strategy.teardown()
found["the user's group afterwards"] = dist.is_initialized()
dist.destroy_process_group()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
found["another size"] = error_of(connected)
dist.destroy_process_group()

# What listens, and on which interface.
strategy = connected()
subgroup = dist.new_group([0, 1])
dist.barrier(subgroup)
found["listening"] = listening()
found["interface"] = os.environ.get("GLOO_SOCKET_IFNAME")
del subgroup
strategy.teardown()
found["interface afterwards"] = os.environ.get("GLOO_SOCKET_IFNAME")
os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the user's choice now
strategy = connected()
strategy.teardown()
found["the user's interface"] = os.environ.get("GLOO_SOCKET_IFNAME")
answer(found)
"""


@pytest.fixture(scope="module")
def lives(shared_programs: Any) -> list[dict[str, Any]]:
    return shared_programs.answers_of(LISTENING + LIFE)


def test_teardown_leaves_no_thread_and_no_hook_though_the_module_lives_on(
    lives: list[dict[str, Any]],
) -> None:
    for rank, found in enumerate(lives):
        server_of_the_store = 1 if rank == 0 else 0
        assert found["threads afterwards"] == found["threads"] + server_of_the_store
        assert found["hook afterwards"] == found["hook"]
        assert found["group afterwards"] is False


def test_a_model_of_a_closed_strategy_infers_but_does_not_train(lives: list[dict[str, Any]]) -> None:
    for found in lives:
        name, message = found["training afterwards"]
        assert name == "SetupError"
        assert "no longer averaged" in message
        assert found["without gradients"] == (2, 2)
        assert found["inference"] is True
        assert found["state"] == ["module.0.weight", "module.0.bias"]


def test_a_module_that_is_not_trained_stays_as_it_is_but_equal_on_all_ranks(
    lives: list[dict[str, Any]],
) -> None:
    assert all(found["frozen"][0] for found in lives)
    assert lives[0]["frozen"] == lives[1]["frozen"]
    assert lives[0]["frozen"][2] == [1, 1, 1]


def test_groups_follow_one_another_in_one_process_and_may_be_shared(lives: list[dict[str, Any]]) -> None:
    assert [found["sum"] for found in lives] == [3, 3]
    assert [found["shared"] for found in lives] == [2, 2]


def test_the_users_own_group_is_used_and_left_alone(lives: list[dict[str, Any]]) -> None:
    for found in lives:
        assert found["on the user's group"] == 2
        assert found["the user's group afterwards"] is True
        assert found["another size"][0] == "ConfigurationError"


def test_on_one_node_nothing_listens_beyond_loopback(lives: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(lives):
        assert len(found["listening"]) >= 3 - rank  # the store on rank 0, and the pairs of two groups
        assert set(found["listening"]) <= {"0100007F", "00000000000000000000000001000000"}
        assert found["interface"] == "lo"
        assert found["interface afterwards"] is None
        assert found["the user's interface"] == "lo"


ALONE = """
strategy = attached(DDPStrategy())
assert strategy.store is None
before = os.environ.copy()
strategy.connect()
net = strategy.setup_module(torch.nn.Linear(2, 1))
net(torch.ones(1, 2)).sum().backward()
gathered = strategy.all_gather(torch.ones(2))
found = {"alone": (strategy.world_size, strategy.global_rank, gathered.shape), "listening": listening()}
strategy.teardown()
found["changed"] = {name for name, _ in os.environ.items() ^ before.items()}

world = 2
os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
for present, port in (("0", "29837"), ("1", "29838")):
    os.environ |= {"FABRIC_LAUNCHED": "1", "RANK": present, "LOCAL_RANK": present, "MASTER_PORT": port}
    started = time.monotonic()
    found[present] = error_of(connected, init_timeout=1), time.monotonic() - started
answer(found)
"""


@pytest.fixture(scope="module")
def alone(shared_programs: Any) -> dict[str, Any]:
    finished = shared_programs.run("-W", "error", str(shared_programs.write(LISTENING + ALONE)))
    assert finished.code == 0, finished.err
    return finished.answers[0]


def test_a_single_process_needs_no_launcher_and_no_store(alone: dict[str, Any]) -> None:
    assert alone["alone"] == (1, 0, (1, 2))
    assert alone["changed"] <= {"TORCHINDUCTOR_CACHE_DIR"}  # set by PyTorch when it imports its compiler
    assert set(alone["listening"]) <= {"0100007F"}


@pytest.mark.parametrize(
    ("present", "reason"), [("0", "rank 1 did not come"), ("1", "Rank 1 could not meet rank 0")]
)
def test_a_rank_that_does_not_come_is_named(alone: dict[str, Any], present: str, reason: str) -> None:
    (name, message), seconds = alone[present]
    assert name == "LaunchError"
    assert reason in message
    assert "127.0.0.1 port 2983" in message
    assert "init_timeout" in message
    assert seconds < 60, "it waits for init_timeout=1, and not for the default"


def test_a_strategy_cannot_connect_before_its_processes_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FABRIC_LAUNCHED", raising=False)
    strategy = DDPStrategy()
    cpu = torch.device("cpu")
    parts = CPUAccelerator(), FullPrecision(), LocalEnvironment(), TorchFile()
    strategy.attach(Surroundings(*parts, (cpu, cpu), 2, 1))
    assert (strategy.world_size, strategy.global_rank) == (2, 0)
    with pytest.raises(
        SetupError, match=r"2 processes, of which 1 are started. Call fabric.launch\(\) first"
    ):
        strategy.connect()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    strategy.teardown()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"find_unused_params": True}, "Did you mean 'find_unused_parameters'?"),
        ({"timout": 3}, "Did you mean 'timeout'?"),
        ({"device_ids": [0]}, "set by the strategy"),
        ({"timeout": -1}, "a number of seconds above 0"),
        ({"init_timeout": "soon"}, "a number of seconds above 0"),
    ],
)
def test_an_option_that_ddp_does_not_have_is_refused_with_advice(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionsError, match=words.replace("?", r"\?")):
        DDPStrategy(**options)
