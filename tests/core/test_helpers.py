"""What a training keeps beside its model: early stopping, averaged weights, metrics; before and after a restart."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import swa_utils

from fabric_core import (
    CheckpointError,
    ConfigurationError,
    EarlyStopping,
    Fabric,
    Metrics,
    ModelAverage,
    UnsupportedError,
    WrongTypeError,
)
from fabric_core.parts.single_device import SingleDeviceStrategy


@pytest.fixture
def fabric() -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    return fabric


class Ranks:
    """A ``Fabric`` as one of several ranks; the others have said already what they send."""

    def __init__(self, rank: int, others: list[Any]) -> None:
        self.global_rank, self.others, self.world_size = rank, others, len(others) + 1

    def all_gather(self, bits: torch.Tensor) -> torch.Tensor:
        sent = [torch.tensor(numbers, dtype=torch.float64).view(torch.int64) for numbers in self.others]
        return torch.stack([*sent[: self.global_rank], bits, *sent[self.global_rank :]])


# -- early stopping ----------------------------------------------------------------------------------------------------


def looks(early: EarlyStopping, values: list[float]) -> list[bool]:
    return [early.update(value) for value in values]


def test_a_run_stops_after_so_many_looks_without_improvement(fabric: Fabric) -> None:
    early = EarlyStopping(fabric, patience=2)
    assert looks(early, [3.0, 2.0, 2.0, 1.0, 1.5]) == [False] * 5
    assert early.update(torch.tensor([1.25]), step=100)
    assert early.update(0.5), "it stays stopped"
    assert (early.best, early.best_step, early.stopped) == (0.5, 6, True)
    assert early.reason == (
        "Nothing was better than the best for 2 look(s), until step 100; it was 1.0 at step 3."
    )


def test_more_can_be_better_and_an_improvement_has_to_be_large_enough(fabric: Fabric) -> None:
    early = EarlyStopping(fabric, patience=2, mode="max", min_delta=0.1, baseline=0.5)
    assert looks(early, [0.55, 0.7, 0.75]) == [False, False, False]
    assert early.best == 0.7
    assert looks(early, [0.85, 0.9, 0.9]) == [False, False, True]
    low = EarlyStopping(fabric, patience=1, mode="max", baseline=0.5)
    assert low.update(0.4)
    assert low.best is None


def test_a_value_that_is_good_enough_stops_at_once(fabric: Fabric) -> None:
    early = EarlyStopping(fabric, threshold=0.1)
    assert looks(early, [0.2, 0.1]) == [False, True]
    assert "as good as 0.1" in early.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_the_best(fabric: Fabric, value: float) -> None:
    stopping = EarlyStopping(fabric, threshold=0.0)
    assert looks(stopping, [1.0, value]) == [False, True]
    assert stopping.best == 1.0
    assert stopping.reason == f"The value at step 1 is {value}."
    counting = EarlyStopping(fabric, patience=2, non_finite="count", threshold=0.0)
    assert looks(counting, [value, 1.0, value, value]) == [False, False, False, True]
    with pytest.raises(ConfigurationError, match=f"the value at step 7 is {value}"):
        EarlyStopping(fabric, non_finite="raise").update(value, 7)


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, math.nan]), max_size=12), st.integers(0, 12), st.integers(1, 4)
)
@settings(max_examples=60, deadline=None)
def test_a_resumed_run_stops_where_one_that_was_never_interrupted_stops(
    values: list[float], cut: int, patience: int
) -> None:
    fabric: Any = Ranks(0, [])
    whole = EarlyStopping(fabric, patience=patience, non_finite="count")
    before = EarlyStopping(fabric, patience=patience, non_finite="count")
    expected, first = looks(whole, values), looks(before, values[:cut])
    after = EarlyStopping(fabric, patience=patience, non_finite="count")
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert first + looks(after, values[cut:]) == expected
    assert after.state_dict() == whole.state_dict()


def test_a_run_that_has_stopped_may_go_on_with_more_patience(fabric: Fabric) -> None:
    early = EarlyStopping(fabric, patience=1)
    assert looks(early, [1.0, 2.0]) == [False, True]
    for patience, stopped in ((1, True), (3, False)):
        resumed = EarlyStopping(fabric, patience=patience)
        resumed.load_state_dict(early.state_dict())
        assert resumed.stopped is stopped
        assert resumed.waited == 1


def test_ranks_that_see_different_values_are_told_instead_of_waiting_for_each_other() -> None:
    ranks: Any = Ranks(1, [[0.5]])
    assert EarlyStopping(ranks).update(0.5) is False
    with pytest.raises(ConfigurationError, match=r"0\.25 on rank 1, 0\.5 on rank 0.*Metrics"):
        EarlyStopping(ranks).update(0.25)
    broken: Any = Ranks(1, [[math.nan]])
    assert EarlyStopping(broken).update(math.nan), "NaN on all ranks is the same value"


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "mni"},
        {"patience": 0},
        {"patience": 1.5},
        {"patience": True},
        {"min_delta": -1.0},
        {"non_finite": "ignore"},
    ],
)
def test_early_stopping_refuses_what_makes_no_sense(fabric: Fabric, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        EarlyStopping(fabric, **arguments)


def test_numbers_may_be_tensors_and_are_kept_as_what_they_were(fabric: Fabric) -> None:
    early, step = EarlyStopping(fabric), torch.tensor(7)
    early.update(torch.tensor([0.5], requires_grad=True), step)
    step += 1
    assert (early.best, early.best_step) == (0.5, 7)
    assert type(early.best_step) is int
    with pytest.raises(ConfigurationError, match=r"shape is \(2,\)"):
        early.update(torch.zeros(2))


def test_the_state_of_something_else_is_refused(fabric: Fabric, tmp_path: Path) -> None:
    for number, saved in enumerate([5, {"best": 1.0}, Metrics(fabric, {"loss": "mean"}).state_dict()]):
        fabric.save(tmp_path / f"{number}", {"helper": saved})
        with pytest.raises(CheckpointError, match="The state of EarlyStopping is needed"):
            fabric.load(tmp_path / f"{number}", {"helper": EarlyStopping(fabric)})
        if number < 2:
            with pytest.raises(CheckpointError, match="The state of Metrics is needed"):
                fabric.load(tmp_path / f"{number}", {"helper": Metrics(fabric, {"loss": "mean"})})


# -- metrics -----------------------------------------------------------------------------------------------------------

KINDS = {"mean": "mean", "sum": "sum", "min": "min", "max": "max"}


def test_a_mean_is_that_of_all_samples_and_not_of_batches(fabric: Fabric) -> None:
    torch.manual_seed(0)
    samples = torch.randn(10, dtype=torch.float64)
    metrics = Metrics(fabric, KINDS)
    for batch in samples.split(4):  # 4, 4, 2
        metrics.update({"mean": batch.mean(), "sum": batch.sum()}, weight=len(batch))
        metrics.update({"min": batch, "max": batch})
    result = metrics.compute()
    assert result["mean"] == pytest.approx(samples.mean().item(), rel=1e-15)
    assert result["sum"] == pytest.approx(samples.sum().item(), rel=1e-14)
    assert (result["min"], result["max"]) == (samples.min().item(), samples.max().item())


def test_samples_of_weight_zero_are_left_out_of_everything(fabric: Fabric) -> None:
    metrics = Metrics(fabric, KINDS)
    batch = torch.tensor([1.0, 2.0, math.nan, 100.0])
    metrics.update(dict.fromkeys(KINDS, batch), weight=torch.tensor([True, True, False, False]))
    metrics.update({"mean": 5.0}, weight=0)
    assert metrics.compute() == {"mean": 1.5, "sum": 3.0, "min": 1.0, "max": 2.0}


def test_sums_are_in_float64_whatever_the_values_are(fabric: Fabric) -> None:
    metrics = Metrics(fabric, KINDS)
    metrics.update({"sum": 2**24, "mean": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)})
    for _ in range(100):
        metrics.update({"sum": torch.tensor(1.0)})
    assert metrics.compute()["sum"] == 2**24 + 100
    assert metrics.compute()["mean"] == 1.5
    metrics.reset()
    metrics.update({"mean": 0.1, "sum": [0.1, 0.2]}, weight=1)
    assert metrics.compute()["mean"] == 0.1
    assert metrics.compute()["sum"] == 0.1 + 0.2


@pytest.mark.parametrize("value", ["low", None, [[1.0], [2.0, 3.0]], {"a": 1.0}])
def test_what_is_no_number_is_told_at_once_and_nothing_is_added(fabric: Fabric, value: Any) -> None:
    metrics = Metrics(fabric, {"loss": "mean", "tokens": "sum"})
    with pytest.raises(ConfigurationError, match="The value of 'loss' is neither a number nor"):
        metrics.update({"tokens": 1, "loss": value}, weight=1)
    assert metrics.compute()["tokens"] == 0


def test_a_tensor_that_changes_after_it_was_passed_counts_as_what_it_was(fabric: Fabric) -> None:
    for running in (torch.zeros(1), np.zeros(1), [0.0]):
        metrics = Metrics(fabric, {"sum": "sum"})
        for _ in range(4):
            running[0] += 1
            metrics.update({"sum": running})
        assert metrics.compute() == {"sum": 10.0}


@pytest.mark.parametrize("weight", [torch.ones(2), torch.ones(3, 1), np.ones((1, 3))])
def test_weights_that_do_not_fit_are_told_at_once_and_nothing_is_added(fabric: Fabric, weight: Any) -> None:
    metrics = Metrics(fabric, {"loss": "mean"})
    metrics.update({"loss": torch.ones(2, 3)}, weight=torch.ones(1, 3))
    with pytest.raises(ConfigurationError, match=r"'loss' have the shape \(3,\), and their weights \("):
        metrics.update({"loss": torch.full((3,), 9.0)}, weight=weight)
    with pytest.raises(ConfigurationError, match=r"have the shape \(2,\), and their weights \(3,\)"):
        metrics.update({"loss": [1.0, 4.0]}, weight=[3.0, 1.0, 1.0])
    metrics.update({"loss": [1.0, 4.0]}, weight=torch.tensor([3.0, 1.0]))
    assert metrics.compute() == {"loss": 1.3}


def test_nothing_and_what_is_not_finite_are_shown_as_what_they_are(fabric: Fabric) -> None:
    metrics = Metrics(fabric, KINDS)
    empty = metrics.compute()
    assert empty.pop("sum") == 0.0
    assert all(map(math.isnan, empty.values()))
    metrics.update(dict.fromkeys(KINDS, torch.tensor([math.inf, 1.0])))
    assert metrics.compute() == {"mean": math.inf, "sum": math.inf, "min": 1.0, "max": math.inf}
    metrics.update(dict.fromkeys(KINDS, torch.tensor([math.nan])))
    assert all(map(math.isnan, metrics.compute().values()))
    metrics.reset()
    assert metrics.compute()["sum"] == 0.0


@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(0, 5)), max_size=150), st.integers(0, 150))
@settings(max_examples=40, deadline=None)
def test_a_restart_in_the_middle_of_an_epoch_changes_no_bit(
    values: list[tuple[float, int]], cut: int
) -> None:
    fabric: Any = Ranks(0, [])

    def see(metrics: Metrics, some: list[tuple[float, int]]) -> None:
        for value, weight in some:
            metrics.update(dict.fromkeys(KINDS, torch.tensor(value)), weight=weight)

    whole, before, after = (Metrics(fabric, KINDS) for _ in range(3))
    see(whole, values)
    see(before, values[:cut])
    after.load_state_dict(before.state_dict())
    see(after, values[cut:])
    assert repr(after.compute()) == repr(whole.compute())


def test_partial_sums_are_kept_for_each_rank_and_dealt_out_to_others() -> None:
    """Three ranks have (sum, weight) = (10, 1), (20, 2), (30, 3); every other number of ranks has the same total."""
    three: Any = Ranks(1, [[10.0, 1.0], [30.0, 3.0]])
    metrics = Metrics(three, {"mean": "mean"})
    metrics.update({"mean": 10.0}, weight=2)
    assert metrics.compute() == {"mean": 10.0}
    state = metrics.state_dict()
    assert state["partials"]["mean"].tolist() == [[10.0, 1.0], [20.0, 2.0], [30.0, 3.0]]
    for world_size in range(1, 6):
        held = []
        for rank in range(world_size):
            some: Any = Ranks(rank, [[0.0, 0.0]] * (world_size - 1))
            resumed = Metrics(some, {"mean": "mean"})
            resumed.load_state_dict(state)
            held.append(resumed.state_dict()["partials"]["mean"][rank].tolist())
        assert [sum(column) for column in zip(*held, strict=True)] == [60.0, 6.0]
        if world_size == 3:
            assert held == state["partials"]["mean"].tolist()


def test_numbers_are_counted_on_the_host_whatever_the_default_device_is(fabric: Fabric) -> None:
    with torch.device("meta"):
        metrics = Metrics(fabric, {"loss": "mean"})
        metrics.update({"loss": torch.tensor([1.0, 2.0], device="cpu")}, weight=3)
        state = metrics.state_dict()
        assert metrics.compute() == {"loss": 1.5}
    assert state["partials"]["loss"].tolist() == [[9.0, 6.0]]


def test_one_number_for_a_mean_has_to_say_of_how_many_samples_it_is(fabric: Fabric) -> None:
    metrics = Metrics(fabric, KINDS)
    for value in (0.5, torch.tensor(0.5)):
        with pytest.raises(ConfigurationError, match=r"of how many samples. Pass weight=len\(batch\)"):
            metrics.update({"mean": value})
    with pytest.raises(ConfigurationError, match="There is no metric 'maen'. Did you mean 'mean'"):
        metrics.update({"maen": 1.0})
    with pytest.raises(ConfigurationError, match="is to be a 'average'"):
        Metrics(fabric, {"loss": "average"})
    with pytest.raises(CheckpointError, match="Make them the same"):
        Metrics(fabric, {"loss": "mean"}).load_state_dict(metrics.state_dict())


# -- averaged weights --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Tied weights, a batch norm, and buffers of which one is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.decoder = nn.Linear(6, 6, bias=False)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.decoder.weight
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.again(self.decoder(self.encoder(inputs)).relu()) * self.scale
        return output


def batches(count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, generator=generator) for _ in range(count)]


def made() -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.Adam(model.parameters(), lr=0.05)


def plain_average(some: list[torch.Tensor], **arguments: Any) -> tuple[Net, swa_utils.AveragedModel]:
    """The loop without us."""
    model, optimizer = made()
    averaged = swa_utils.AveragedModel(model, **arguments)
    for batch in some:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
    return model, averaged


def average_in(fabric: Fabric, some: list[torch.Tensor], **arguments: Any) -> tuple[Any, Any, ModelAverage]:
    model, optimizer = made()
    model, optimizer = fabric.setup(model, optimizer)
    average = ModelAverage(fabric, model, **arguments)
    train(fabric, model, optimizer, average, some)
    return model, optimizer, average


def train(
    fabric: Fabric, model: Any, optimizer: Any, average: ModelAverage, some: list[torch.Tensor]
) -> None:
    for batch in some:
        fabric.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        average.update()


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("decay", [0.9, None])
def test_the_average_is_that_of_pytorch_to_the_last_bit(
    fabric: Fabric, decay: float | None, use_buffers: bool
) -> None:
    function = None if decay is None else swa_utils.get_ema_multi_avg_fn(decay)
    plain, averaged = plain_average(batches(), multi_avg_fn=function, use_buffers=use_buffers)
    model, _, average = average_in(fabric, batches(), decay=decay, use_buffers=use_buffers)
    assert_same(average.state_dict()["module"], averaged.module.state_dict())
    assert average.updates == 6
    trained = copy.deepcopy(model.state_dict())
    assert_same(trained, plain.state_dict())
    with average.applied() as applied:
        assert applied is model
        assert_same(model.state_dict(), averaged.module.state_dict())
        model.eval()
        averaged.eval()
        assert torch.equal(model(batches()[0]), averaged(batches()[0]))
        assert model.again.weight is model.decoder.weight
    assert_same(model.state_dict(), trained)
    assert not torch.equal(trained["decoder.weight"], averaged.module.state_dict()["decoder.weight"])


def test_a_plain_model_loads_the_averaged_weights(fabric: Fabric, tmp_path: Path) -> None:
    _, _, average = average_in(fabric, batches(), decay=0.9)
    fabric.save(tmp_path / "run.ckpt", {"average": average})
    loaded = torch.load(tmp_path / "run.ckpt", weights_only=True)
    plain = Net()
    plain.load_state_dict(loaded["average"]["module"])
    assert_same(plain.state_dict(), average.state_dict()["module"])
    assert int(loaded["average"]["count"]["n_averaged"]) == 6


def test_an_average_that_does_not_fit_is_called_by_the_name_of_its_model(
    fabric: Fabric, tmp_path: Path
) -> None:
    _, _, average = average_in(fabric, [])
    other = fabric.setup_module(nn.Linear(2, 2))
    fabric.save(tmp_path / "run.ckpt", {"average": ModelAverage(fabric, other)})
    with pytest.raises(
        CheckpointError, match=r"(?s)'average\.module' does not fit this Net;.*loading state_dict for Net"
    ):
        fabric.load(tmp_path / "run.ckpt", {"average": average})


def test_a_resumed_run_averages_as_if_never_interrupted(fabric: Fabric, tmp_path: Path) -> None:
    _, _, whole = average_in(fabric, batches())
    model, optimizer, average = average_in(fabric, batches()[:2])
    state = {"model": model, "optimizer": optimizer, "average": average}
    fabric.save(tmp_path / "run.ckpt", state)
    model, optimizer, average = average_in(fabric, [])
    rest = fabric.load(tmp_path / "run.ckpt", {"model": model, "optimizer": optimizer, "average": average})
    assert rest == {}
    assert average.updates == 2
    train(fabric, model, optimizer, average, batches()[2:])
    assert_same(average.state_dict()["module"], whole.state_dict()["module"])
    again = ModelAverage(fabric, model)
    again.load_state_dict(average.state_dict())
    assert again.updates == 6
    assert_same(again.state_dict()["module"], whole.state_dict()["module"])


def test_an_average_that_is_saved_in_the_background_is_that_of_the_moment(
    fabric: Fabric, tmp_path: Path
) -> None:
    model, optimizer, average = average_in(fabric, batches()[:3])
    expected = copy.deepcopy(average.state_dict()["module"])
    fabric.save(tmp_path / "run.ckpt", {"average": average}, wait=False)
    train(fabric, model, optimizer, average, batches())
    again = ModelAverage(fabric, model)
    fabric.load(tmp_path / "run.ckpt", {"average": again})
    assert again.updates == 3
    assert_same(again.state_dict()["module"], expected)


def test_an_object_of_ones_own_may_say_what_its_state_consists_of(fabric: Fabric, tmp_path: Path) -> None:
    class Pair:
        def __init__(self) -> None:
            self.model = fabric.setup(nn.Linear(2, 2))

        def state_parts(self) -> dict[str, Any]:
            return {"model": self.model, "average": ModelAverage(fabric, self.model)}

    pairs, others = [Pair(), Pair()], [Pair(), Pair()]
    fabric.save(tmp_path / "run.ckpt", {"pairs": pairs})
    assert fabric.load(tmp_path / "run.ckpt", {"pairs": others}) == {}
    for pair, other in zip(pairs, others, strict=True):
        assert_same(pair.model.state_dict(), other.model.state_dict())


def test_weights_come_back_when_the_block_fails_and_before_the_first_update(fabric: Fabric) -> None:
    model, _, average = average_in(fabric, batches())
    trained = copy.deepcopy(model.state_dict())

    def fail() -> None:
        with average.applied():
            raise KeyError("on purpose")

    with pytest.raises(KeyError):
        fail()
    assert_same(model.state_dict(), trained)
    fresh = ModelAverage(fabric, model)
    with torch.no_grad():
        model.decoder.weight.add_(1.0)
    with fresh.applied():
        assert torch.equal(model.decoder.weight, trained["decoder.weight"] + 1.0)


def test_statistics_of_batch_norms_are_those_of_the_averaged_weights(fabric: Fabric) -> None:
    model, _, average = average_in(fabric, batches())
    _, averaged = plain_average(batches())
    trained = copy.deepcopy(model.state_dict())
    data = [(batch, torch.zeros(len(batch))) for batch in batches(3)]
    swa_utils.update_bn(data, averaged)
    average.update_bn(data)
    assert_same(average.state_dict()["module"], averaged.module.state_dict())
    assert_same(model.state_dict(), trained)
    with pytest.raises(ConfigurationError, match="no batch"):
        average.update_bn([])
    assert_same(average.state_dict()["module"], averaged.module.state_dict())
    assert_same(model.state_dict(), trained)


def test_averages_may_be_more_precise_than_weights(fabric: Fabric) -> None:
    torch.manual_seed(0)
    model = fabric.setup(nn.Linear(3, 3).to(torch.bfloat16))
    coarse = ModelAverage(fabric, model, decay=0.999)
    fine = ModelAverage(fabric, model, decay=0.999, dtype=torch.float32)
    expected = model.weight.detach().float()
    for average in (coarse, fine):
        average.update()
    with torch.no_grad():
        model.weight.mul_(1.01)
    for _ in range(20):
        coarse.update()
        fine.update()
        expected = expected.lerp(model.weight.detach().float(), 0.001)
    assert torch.equal(coarse.state_dict()["module"]["weight"], (model.weight / 1.01)), "it cannot move"
    torch.testing.assert_close(fine.state_dict()["module"]["weight"], expected)
    with fine.applied():
        assert torch.equal(model.weight, expected.to(torch.bfloat16))
    assert fine.state_dict()["module"]["weight"].dtype is torch.float32


def test_an_average_refuses_what_it_cannot_do(fabric: Fabric) -> None:
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        ModelAverage(fabric, fabric.setup(nn.Linear(1, 1)), decay=99.0)
    with pytest.raises(WrongTypeError, match=r"that fabric.setup\(\) returned, not a Linear"):
        ModelAverage(fabric, nn.Linear(1, 1))


def test_weights_that_a_strategy_hides_are_not_averaged_in_silence() -> None:
    class Hiding(SingleDeviceStrategy):
        def module_state_dict(self, module: nn.Module) -> dict[str, Any]:
            return {name: value[:0] for name, value in super().module_state_dict(module).items()}

    fabric = Fabric(accelerator="cpu", devices=1, strategy=Hiding())
    with pytest.raises(UnsupportedError, match="keeps them elsewhere between two steps: bias, weight"):
        ModelAverage(fabric, fabric.setup(nn.Linear(1, 1)))
