"""Collectives over collections and numbers, on one process and with a strategy that pretends to be several."""

from __future__ import annotations

import decimal
import enum
import fractions
import math
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import one_process
import pytest
import torch
from torch import Tensor

from fabric_core import ConfigurationError, Fabric, SetupError, Strategy, StrategySpec
from fabric_core.collectives import reduce_op, reducible

pytestmark = pytest.mark.usefixtures("core_alone")

Pair = namedtuple("Pair", "loss accuracy")


@dataclass(frozen=True)
class Metrics:
    loss: Any
    name: str = "x"


class Level(enum.IntEnum):
    HIGH = 3


fabric = one_process.fabric


class Twins(Strategy):
    """Pretends that a second rank holds the same values; for reductions, that it holds them doubled."""

    spec = StrategySpec("twins", "", supports=("cpu",))

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        self.seen.append((group, sync_grads))
        return torch.stack([tensor, tensor])

    def all_reduce(self, tensor: Tensor, op: Any = "mean", group: Any = None) -> Tensor:
        self.seen.append((op, group, tensor.dtype))
        both = torch.stack([tensor, tensor * 2])
        reductions = {
            "mean": lambda: both.mean(0),
            "sum": lambda: both.sum(0),
            "min": lambda: both.amin(0),
            "max": lambda: both.amax(0),
            "product": lambda: both.prod(0),
        }
        return reductions[op]()


@pytest.fixture
def twins() -> Iterator[Fabric]:
    with Fabric(accelerator="cpu", strategy=Twins()) as fabric:
        yield fabric


# -- one process --------------------------------------------------------------------------------------------------


def test_on_one_process_nothing_changes_but_the_copy(fabric: Fabric) -> None:
    tensor = torch.arange(3.0)
    reduced = fabric.all_reduce(tensor)
    assert torch.equal(reduced, tensor)
    reduced += 1
    assert torch.equal(tensor, torch.arange(3.0))
    assert fabric.all_gather(tensor).shape == (1, 3)
    assert fabric.all_gather(torch.tensor(1)).shape == (1,)
    obj = {"any": object()}
    assert fabric.broadcast(obj) is obj
    assert fabric.barrier() is None
    assert fabric.barrier(name="epoch") is None


@pytest.mark.parametrize("source", [-1, 1, 7])
def test_a_rank_that_does_not_exist_is_refused(fabric: Fabric, source: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"src={source}\): there are ranks 0 to 0"):
        fabric.broadcast(1, src=source)


@pytest.mark.parametrize("op", ["mean", "AVG", "sum", "min", "max", "product"])
def test_every_reduction_has_a_name(fabric: Fabric, op: str) -> None:
    assert fabric.all_reduce(2.0, reduce_op=op) == 2.0


def test_a_reduction_that_does_not_exist_is_answered_with_those_that_do(fabric: Fabric) -> None:
    with pytest.raises(ConfigurationError, match=r"'maen'.*mean 'mean'\?.*avg, max, mean, min, product, sum"):
        fabric.all_reduce(1.0, reduce_op="maen")
    with pytest.raises(ConfigurationError, match="not known"):
        reduce_op(None)  # type: ignore[arg-type]


# -- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (True, torch.bool),
        (3, torch.int64),
        (2**40 + 1, torch.int64),
        (-(2**63), torch.int64),
        (0.1, torch.float64),
        (1e300, torch.float64),
        (1j, torch.complex128),
        (Level.HIGH, torch.int64),
        (fractions.Fraction(1, 4), torch.float64),
        (np.float64(0.1), torch.float64),
        (np.float32(0.5), torch.float32),
        (np.int32(7), torch.int32),
        (np.bool_(True), torch.bool),
        (np.array([1.5, 2.5]), torch.float64),
    ],
    ids=lambda value: f"{type(value).__name__} {value}",
)
def test_numbers_become_tensors_that_hold_them_exactly(
    twins: Fabric, number: Any, dtype: torch.dtype
) -> None:
    gathered = twins.all_gather(number)
    assert gathered.dtype is dtype
    assert np.array_equal(gathered[0].numpy(), np.asarray(number))


def test_a_number_that_no_tensor_can_hold_is_refused(twins: Fabric) -> None:
    with pytest.raises(ConfigurationError, match="does not fit into torch.int64"):
        twins.all_reduce({"n": 2**63})


def test_means_of_whole_numbers_are_not_cut_off(twins: Fabric) -> None:
    for value in (1, torch.tensor(1), torch.tensor(1, dtype=torch.uint8), np.int64(1)):
        mean = twins.all_reduce(value)
        assert (mean.item(), mean.dtype) == (1.5, torch.float64)
    assert twins.all_reduce(2**40 + 1, reduce_op="sum").item() == 3 * (2**40 + 1)
    assert twins.all_reduce(torch.tensor([1, 3])).tolist() == [1.5, 4.5]
    half = twins.all_reduce(torch.tensor(1.0, dtype=torch.bfloat16))
    assert (half.item(), half.dtype) == (1.5, torch.bfloat16)


@pytest.mark.parametrize(
    ("op", "dtype"),
    [("mean", torch.float64), ("sum", torch.int64), ("product", torch.int64), ("max", torch.bool)],
)
def test_truths_are_counted(op: Any, dtype: torch.dtype) -> None:
    assert reducible(torch.tensor([True, False]), op).dtype is dtype
    whole, real = torch.tensor(2, dtype=torch.int32), torch.tensor(2.0)
    assert reducible(whole, "sum") is whole
    assert reducible(real, "mean") is real


def test_numbers_that_are_not_finite_travel_too(fabric: Fabric) -> None:
    assert fabric.all_reduce(math.inf) == math.inf
    assert fabric.all_reduce(math.nan).isnan()


# -- collections --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        {"loss": 2.0, "n": 4},
        [2.0, (4, {"deep": torch.ones(2)})],
        Pair(2.0, 0.5),
        Pair(torch.ones(1), [1, 2]),
        Metrics(2.0),
        Metrics({"a": Pair(1, 2)}),
        OrderedDict(b=1.0, a=2.0),
        defaultdict(list, a=[1.0]),
        {},
        [],
        (),
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_every_number_in_a_collection_is_reduced_and_the_collection_keeps_its_type(
    twins: Fabric, data: Any
) -> None:
    def leaves(value: Any) -> list[float]:
        if isinstance(value, dict):
            return [leaf for entry in value.values() for leaf in leaves(entry)]
        if isinstance(value, list | tuple):
            return [leaf for entry in value for leaf in leaves(entry)]
        if isinstance(value, Metrics):
            assert value.name == "x"
            return leaves(value.loss)
        return [float(number) for number in torch.as_tensor(value).flatten()]

    def types(value: Any) -> Any:
        if isinstance(value, dict):
            return type(value), [(key, types(entry)) for key, entry in value.items()]
        if isinstance(value, list | tuple):
            return type(value), [types(entry) for entry in value]
        return (type(value), types(value.loss)) if isinstance(value, Metrics) else None

    before = repr(data)
    reduced = twins.all_reduce(data, reduce_op="sum")
    assert leaves(reduced) == [3 * leaf for leaf in leaves(data)]
    assert types(reduced) == types(data)
    assert repr(data) == before


def test_what_is_no_number_stays_as_it_is(twins: Fabric) -> None:
    data = {"name": "x", "none": None, "raw": b"y", "price": decimal.Decimal("1.5"), "set": {1}}
    assert twins.all_reduce(data) is data


def test_group_and_gradients_reach_the_strategy(twins: Fabric) -> None:
    group = object()
    twins.all_gather([1.0, 2.0], group=group, sync_grads=True)
    twins.all_reduce(1, group=group, reduce_op="max")
    assert twins.strategy.seen == [(group, True), (group, True), ("max", group, torch.int64)]  # type: ignore[attr-defined]


def test_gradients_flow_through_a_gather_that_lets_them(twins: Fabric) -> None:
    weight = torch.ones(2, requires_grad=True)
    twins.all_gather({"x": weight}, sync_grads=True)["x"].sum().backward()
    assert torch.equal(weight.grad, torch.full((2,), 2.0))  # type: ignore[arg-type]


# -- rank 0 first -------------------------------------------------------------------------------------------------


class Shared:
    """A store in this process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str, /) -> None:
        self.values[key] = value

    def get(self, key: str, /) -> bytes:
        return self.values[key].encode()

    def check(self, keys: list[str], /) -> bool:
        return all(key in self.values for key in keys)


class Ranked(Strategy):
    """One rank of several: two on each node, one thread each."""

    spec = StrategySpec("ranked", "", supports=("cpu",))

    def __init__(self, rank: int, shared: Shared) -> None:
        self.rank, self.shared = rank, shared

    global_rank = property(lambda self: self.rank)  # type: ignore[assignment]
    local_rank = property(lambda self: self.rank % 2)  # type: ignore[assignment]
    node_rank = property(lambda self: self.rank // 2)  # type: ignore[assignment]

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def store(self) -> Any:
        return self.shared if self.joined else None

    joined = False

    def connect(self) -> None:
        self.joined = True


def on_ranks(number: int, work: Callable[[Fabric], Any]) -> list[Any]:
    """What each of several ranks returns, or raises."""
    shared = Shared()

    def run(rank: int) -> Any:
        with Fabric(accelerator="cpu", strategy=Ranked(rank, shared)) as fabric:
            try:
                return work(fabric)
            except (ZeroDivisionError, SetupError) as error:
                return error

    with ThreadPoolExecutor(max_workers=number) as pool:
        return list(pool.map(run, range(number)))


@pytest.mark.parametrize("local", [False, True])
def test_rank_zero_runs_the_block_before_all_others(local: bool) -> None:
    order: list[tuple[int, int]] = []

    def work(fabric: Fabric) -> None:
        for turn in range(3):
            with fabric.rank_zero_first(local=local):
                order.append((turn, fabric.global_rank))

    assert on_ranks(4, work) == [None] * 4
    for turn in range(3):
        ranks = [rank for when, rank in order if when == turn]
        assert sorted(ranks) == [0, 1, 2, 3]
        if local:
            assert ranks.index(0) < ranks.index(1)
            assert ranks.index(2) < ranks.index(3)
        else:
            assert ranks[0] == 0


def test_when_rank_zero_fails_in_the_block_the_others_fail_without_running_it() -> None:
    ran: list[int] = []

    def work(fabric: Fabric) -> None:
        with fabric.rank_zero_first():
            ran.append(fabric.global_rank)
            raise ZeroDivisionError("the download failed")

    first, *others = on_ranks(3, work)
    assert ran == [0]
    assert isinstance(first, ZeroDivisionError)
    for error in others:
        assert isinstance(error, SetupError)
        assert "rank 0 failed" in str(error)
        assert "ZeroDivisionError: the download failed" in str(error)
