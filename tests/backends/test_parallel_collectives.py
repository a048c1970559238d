"""What the base of parallel strategies gives to all of them: collectives, messages, checkpoints that agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch

DTYPES = (
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint16",
    "uint32",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "complex128",
)

COLLECTIVES = f"""
DTYPES = {DTYPES!r}
found = everything["collectives"] = {{}}

# The same numbers on both ranks: what each of them passes is a row.
rows = torch.tensor([[3, 0, 1, 5], [2, 0, 1, 7]])
for name in DTYPES:
    mine = rows[rank].to(getattr(torch, name))
    before = mine.clone()
    for op in ("sum", "product", "min", "max", "mean"):
        if op == "mean" and not (mine.is_floating_point() or mine.is_complex()):
            continue
        if op in ("min", "max") and mine.is_complex():
            continue
        found[name, op] = strategy.all_reduce(mine, op)
    found[name, "gather"] = strategy.all_gather(mine)
    found[name, "broadcast"] = strategy.broadcast(mine if rank == 1 else None, src=1)
    assert torch.equal(mine, before)

whole = torch.arange(12.0).reshape(3, 4) * (rank + 1)
found["transposed"] = strategy.all_reduce(whole.t(), "sum"), strategy.all_gather(whole.t())
found["scalar"] = strategy.all_reduce(torch.tensor(rank + 1.0)), strategy.all_gather(torch.tensor(rank + 1.0))
found["empty"] = strategy.all_reduce(torch.empty(0, 3), "sum").shape, strategy.all_gather(torch.empty(0, 3)).shape
found["conjugate"] = strategy.all_gather(torch.tensor([1 + 2j, rank * 1j]).conj())
found["large half"] = strategy.all_reduce(torch.tensor([60000.0], dtype=torch.float16), "mean").item()
found["no such op"] = error_of(strategy.all_reduce, torch.ones(1), "maximum")

alone = [dist.new_group([0]), dist.new_group([1])][rank]
found["subgroup"] = (
    strategy.all_reduce(torch.tensor(rank + 1.0), "mean", group=alone).item(),
    strategy.all_gather(torch.tensor(rank), group=alone).tolist(),
)

# Gradients through a gather, against differences: every rank has its own function of what all ranks have.
torch.manual_seed(rank)
mine = torch.randn(3, dtype=torch.float64)
weights = torch.randn(2, 3, dtype=torch.float64)
def objective(values):
    return (weights * strategy.all_gather(values, sync_grads=True) ** 3).sum()
leaf = mine.clone().requires_grad_()
objective(leaf).backward()
def total(values):
    return strategy.all_reduce(objective(values).detach(), "sum").item()
step = 1e-6
estimate = torch.empty(2, 3, dtype=torch.float64)
for whose in range(2):
    for index in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[index] = step if whose == rank else 0
        estimate[whose, index] = (total(mine + shift) - total(mine - shift)) / (2 * step)
found["gradient"] = leaf.grad, estimate[rank]
found["no gradient asked for"] = strategy.all_gather(leaf).requires_grad
"""


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_reduced_gathered_and_sent(collected: list[dict[Any, Any]], name: str) -> None:
    dtype = getattr(torch, name)
    expected = {
        "sum": [5, 0, 2, 12],
        "product": [6, 0, 1, 35],
        "min": [2, 0, 1, 5],
        "max": [3, 0, 1, 7],
        "mean": [2.5, 0, 1, 6],
        "gather": [[3, 0, 1, 5], [2, 0, 1, 7]],
        "broadcast": [2, 0, 1, 7],
    }
    for found in collected:
        for what, values in expected.items():
            if (name, what) in found:
                assert found[name, what].dtype == dtype
                assert torch.equal(found[name, what], torch.tensor(values).to(dtype)), what
        missing = {what for what in expected if (name, what) not in found}
        assert missing == (
            {"min", "max"} if dtype.is_complex else set() if dtype.is_floating_point else {"mean"}
        )


def test_tensors_of_any_layout_and_shape_are_combined(collected: list[dict[Any, Any]]) -> None:
    base = torch.arange(12.0).reshape(3, 4).t()
    for found in collected:
        reduced, gathered = found["transposed"]
        assert torch.equal(reduced, 3 * base)
        assert torch.equal(gathered, torch.stack([base, 2 * base]))
        mean, both = found["scalar"]
        assert (mean.shape, mean.item()) == ((), 1.5)
        assert both.tolist() == [1, 2]
        assert found["empty"] == ((0, 3), (2, 0, 3))
        assert found["conjugate"].tolist() == [[1 - 2j, 0], [1 - 2j, -1j]]


def test_a_mean_of_half_precision_numbers_does_not_overflow(collected: list[dict[Any, Any]]) -> None:
    assert [found["large half"] for found in collected] == [60000, 60000]


def test_an_unknown_reduction_is_refused_before_anything_is_sent(collected: list[dict[Any, Any]]) -> None:
    for found in collected:
        name, message = found["no such op"]
        assert name == "ConfigurationError"
        assert "There are: max, mean, min, product, sum." in message


def test_a_subgroup_is_honoured(collected: list[dict[Any, Any]]) -> None:
    assert [found["subgroup"] for found in collected] == [(1.0, [0]), (2.0, [1])]


def test_gradients_flow_back_through_a_gather(collected: list[dict[Any, Any]]) -> None:
    for found in collected:
        gradient, estimate = found["gradient"]
        assert torch.allclose(gradient, estimate, rtol=0, atol=1e-7)
        assert found["no gradient asked for"] is False


MESSAGES = """
import threading
from dataclasses import dataclass

@dataclass
class Metrics:
    loss: float
    weights: torch.Tensor

class Odd:
    def __init__(self):
        self.lock = threading.Lock()

found = everything["messages"] = {}
def sent(obj, src=0):
    return strategy.broadcast(obj if rank == src else "ignored", src)

shared = torch.arange(3.0)
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
model[1].weight = model[0].weight
torch.nn.init.constant_(model[0].weight, 4.0)
found["plain"] = [sent(obj) for obj in (None, 7, "text", {"a": [1, 2.5]}, b"x" * 100_000)]
found["metrics"] = sent(Metrics(0.5, torch.arange(6).reshape(2, 3).t())).weights.tolist()
twice = sent([shared, {"again": shared}])
found["twice"] = twice[0].tolist(), twice[0] is twice[1]["again"]
copy = sent(model)
found["model"] = copy[1].weight is copy[0].weight, copy[0].weight.tolist(), type(copy[0].weight).__name__
leaf = torch.ones(2, requires_grad=True)
found["graph"] = sent((leaf * 2).sum()).item(), sent(leaf).requires_grad, sent(leaf.detach()).requires_grad
found["state"] = {key: value.shape for key, value in sent(model.state_dict()).items()}
found["from the other"] = sent({"rank": rank}, src=1)
found["unpicklable"] = error_of(sent, Odd())
found["no such rank"] = error_of(strategy.broadcast, 1, 2)
found["afterwards"] = sent("still working")

strategy.barrier()
strategy.barrier("both")
found["different barriers"] = error_of(strategy.barrier, "save" if rank else None)

# What a pickled tensor is rebuilt by.
calls = []
before = torch._utils._rebuild_tensor_v2
torch._utils._rebuild_tensor_v2 = lambda *args: calls.append(args)
found["tensor"] = sent(torch.full((1000,), 3.0)).sum().item()
torch._utils._rebuild_tensor_v2 = before
found["pickled tensors"] = len(calls)
"""


def test_objects_arrive_as_they_were_sent(messages: list[dict[str, Any]]) -> None:
    for found in messages:
        assert found["plain"] == [None, 7, "text", {"a": [1, 2.5]}, b"x" * 100_000]
        assert found["metrics"] == [[0, 3], [1, 4], [2, 5]]
        assert found["from the other"] == {"rank": 1}
        assert found["graph"] == (4.0, True, False)


def test_tensors_in_objects_travel_once_and_stay_shared(messages: list[dict[str, Any]]) -> None:
    for found in messages:
        assert found["twice"] == ([0, 1, 2], True)
        assert found["model"] == (True, [[4, 4], [4, 4]], "Parameter")
        assert found["state"]["0.weight"] == (2, 2)
        assert (found["tensor"], found["pickled tensors"]) == (3000, 0)


def test_what_cannot_be_sent_is_an_error_on_every_rank_and_nobody_waits(
    messages: list[dict[str, Any]],
) -> None:
    for found in messages:
        name, message = found["unpicklable"]
        assert name == "WrongTypeError"
        assert "Rank 0 cannot send" in message
        assert "lock" in message
        assert found["no such rank"][0] == "ConfigurationError"
        assert found["afterwards"] == "still working"


def test_ranks_at_different_barriers_are_told_so(messages: list[dict[str, Any]]) -> None:
    for found in messages:
        name, message = found["different barriers"]
        assert name == "SetupError"
        assert "rank 0 at an unnamed one, rank 1 at 'save'" in message


CHECKPOINTS = """
from pathlib import Path
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it compiles something in a way that PyTorch has deprecated
    from torch.distributed.optim import ZeroRedundancyOptimizer

found = everything["checkpoints"] = {}
path = Path("run/last.ckpt")
strategy.save_checkpoint(path, {"rank": rank, "weights": torch.ones(2)})
found["there on return"] = path.exists()
loaded = strategy.load_checkpoint(path)
found["loaded"] = loaded["rank"], loaded["weights"].tolist()

Path("a file").touch()
found["unwritable"] = error_of(strategy.save_checkpoint, Path("a file/x.ckpt"), {})
class Unkind:
    def save(self, path, checkpoint):
        raise PermissionError("not there")
io = strategy.surroundings.checkpoint_io
object.__setattr__(strategy.surroundings, "checkpoint_io", Unkind())
found["foreign error"] = error_of(strategy.save_checkpoint, path, {})
object.__setattr__(strategy.surroundings, "checkpoint_io", io)
found["missing"] = error_of(strategy.load_checkpoint, Path("nowhere.ckpt"))
if rank == 1:
    torch.save({"only": "here"}, "1.ckpt")
strategy.barrier()
found["on one rank only"] = error_of(strategy.load_checkpoint, Path(f"{rank}.ckpt"))

net = strategy.setup_module(torch.nn.Linear(4, 4))
optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
net(torch.ones(1, 4)).sum().backward()
optimizer.step()
state = strategy.optimizer_state_dict(optimizer)
found["sharded optimizer"] = sorted(state.get("state", {}))
plain = torch.optim.SGD(net.parameters(), lr=0.1)
found["plain optimizer"] = strategy.optimizer_state_dict(plain)["param_groups"][0]["lr"]
strategy.teardown()
"""


def test_a_checkpoint_is_written_by_rank_0_and_there_for_all_on_return(
    checkpoints: list[dict[str, Any]],
) -> None:
    for found in checkpoints:
        assert found["there on return"] is True
        assert found["loaded"] == (0, [1, 1])


def test_a_checkpoint_that_cannot_be_written_is_an_error_on_every_rank(
    checkpoints: list[dict[str, Any]],
) -> None:
    for rank, found in enumerate(checkpoints):
        for what, reason in (("unwritable", "a file"), ("foreign error", "PermissionError: not there")):
            name, message = found[what]
            assert name == "CheckpointError"
            assert reason in message
            assert ("Rank 0 could not write" in message) == (rank == 1 or what == "foreign error")


def test_a_checkpoint_that_one_rank_cannot_read_is_an_error_on_every_rank(
    checkpoints: list[dict[str, Any]],
) -> None:
    for found in checkpoints:
        assert found["missing"][0] == "CheckpointError"
        assert found["on one rank only"][0] == "CheckpointError"
    assert "There is no checkpoint at '0.ckpt'" in checkpoints[0]["on one rank only"][1]
    assert "Rank 0 could not read" in checkpoints[1]["on one rank only"][1]


def test_the_state_of_a_sharded_optimizer_is_collected_on_rank_0(checkpoints: list[dict[str, Any]]) -> None:
    assert [found["sharded optimizer"] for found in checkpoints] == [[0, 1], []]
    assert [found["plain optimizer"] for found in checkpoints] == [0.1, 0.1]


SLOW = """
class Slow:
    def save(self, path, checkpoint):
        time.sleep(6)
        path.touch()
    def load(self, path, weights_only):
        time.sleep(4 * rank)
        return {"rank": rank}

strategy = connected(timeout=3)
object.__setattr__(strategy.surroundings, "checkpoint_io", Slow())
started = time.monotonic()
strategy.save_checkpoint(Path("slow.ckpt"), {})
found = everything["slow"] = {"there": os.path.exists("slow.ckpt"), "save": time.monotonic() - started}
started = time.monotonic()
found["loaded"] = strategy.load_checkpoint(Path("slow.ckpt"))
found["load"] = time.monotonic() - started
strategy.barrier()
strategy.teardown()
"""

ABSENT = """
strategy = connected(timeout=1)
if rank == 0:
    everything["absent"] = error_of(strategy.barrier, "evaluation")
    open("seen", "w").close()
else:
    while not os.path.exists("seen"):
        time.sleep(0.05)
answer(everything)
"""


@pytest.fixture(scope="module")
def everything(shared_programs: Any) -> list[dict[str, Any]]:
    """What two processes found, one script after the other: starting them takes longer than the scripts."""
    beginning = "everything = {}\nstrategy = connected()\n"
    return shared_programs.answers_of(beginning + COLLECTIVES + MESSAGES + CHECKPOINTS + SLOW + ABSENT)


@pytest.fixture
def collected(everything: list[dict[str, Any]]) -> list[dict[Any, Any]]:
    return [found["collectives"] for found in everything]


@pytest.fixture
def messages(everything: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [found["messages"] for found in everything]


@pytest.fixture
def checkpoints(everything: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [found["checkpoints"] for found in everything]


def test_a_disk_may_be_slower_than_a_collective(everything: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(everything):
        slow = found["slow"]
        assert slow["there"] is True
        assert slow["loaded"] == {"rank": rank}
        assert (slow["save"] > 5, slow["load"] > 3.5) == (True, True)


def test_a_rank_that_does_not_come_to_a_barrier_is_named(everything: list[dict[str, Any]]) -> None:
    name, message = everything[0]["absent"]
    assert name == "SetupError"
    assert "barrier 'evaluation': missing are 1 of 2" in message
