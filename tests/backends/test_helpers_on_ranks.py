"""Early stopping, averaged weights and metrics on two real processes, whole and in shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

TASK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.decoder = nn.Linear(6, 6, bias=False)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.decoder.weight
    def forward(self, x):
        return self.again(self.decoder(self.encoder(x)).relu())

def made():
    torch.manual_seed(0)
    model = Net()
    model.encoder[1].eval()  # its own statistics are another matter: whoever sees half of a batch has other ones
    return model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

def batches(seed=1, count=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 4, generator=generator) for _ in range(count)]
"""

PROGRAM = (
    TASK
    + """
import contextlib, copy
from fabric_core import EarlyStopping, Fabric, Metrics, ModelAverage
from fabric_core.errors import ConfigurationError

def whole(state):
    return {name: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for name, v in state.items()}

def train(fabric, model, optimizer, average, some):
    for batch in some:
        fabric.backward(model(batch.chunk(world)[rank]).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        average.update()

def with_torchmetrics(fabric):
    "As the documentation says."
    try:
        from torchmetrics.aggregation import SumMetric
    except ImportError:
        return None
    metric, again = SumMetric(), SumMetric()
    metric.update(1.0 + rank)
    metric.persistent(True)
    with metric.sync_context():
        fabric.save("torchmetrics.ckpt", {"metric": metric})
    again.persistent(True)
    fabric.load("torchmetrics.ckpt", {"metric": again})
    if not fabric.is_global_zero:
        again.reset()
    again.update(10.0)
    return again.compute().item()

def shards_read_back(fabric, state):
    fabric.save("folder", state)
    average, again = state["average"], ModelAverage(fabric, state["model"])
    rest = fabric.load("folder", {"average": again})
    assert set(rest) == {"model", "optimizer"} and os.path.isdir("folder")
    pairs = zip(again._averages.state_dict().values(), average._averages.state_dict().values())
    return all(torch.equal(one, other) for one, other in pairs) and again.updates == average.updates

found = {}
for strategy in ("ddp", "fsdp"):
    with Fabric(accelerator="cpu", devices=2, strategy=strategy) as fabric:
        fabric.launch()
        mine = found[strategy] = {}
        model, optimizer = fabric.setup(*made())
        average = ModelAverage(fabric, model, decay=0.75)
        train(fabric, model, optimizer, average, batches())
        mine["average"] = whole(average.state_dict()["module"])
        mine["held"] = sum(tensor.numel() for tensor in average._averages.parameters())
        trained = whole(model.state_dict())
        model.eval()
        with torch.no_grad():
            own = model(batches()[0])  # a pass after which a strategy may keep what it has gathered
            with average.applied():
                mine["applied"] = model(batches()[0])
            mine["own again"] = torch.equal(own, model(batches()[0])) and not torch.equal(own, mine["applied"])
        with average.applied():
            mine["weights"] = whole(fabric.strategy.module_state_dict(model.module))
        back = whole(fabric.strategy.module_state_dict(model.module))
        mine["back"] = all(map(torch.equal, trained.values(), back.values()))
        state = {"model": model, "optimizer": optimizer, "average": average}
        if strategy == "fsdp":
            mine["read back"] = shards_read_back(fabric, state)
            fabric.strategy.checkpoint = "full"
        fabric.save(f"{strategy}.ckpt", state)

        equal = ModelAverage(fabric, model)
        equal.update()
        model.train()
        equal.update_bn([batch for i, batch in enumerate(batches(7, 4)) if i % world == rank])
        mine["bn"] = whole(equal.state_dict()["module"])

        metrics = Metrics(fabric, {"mean": "mean", "sum": "sum", "max": "max"})
        samples = torch.arange(7, dtype=torch.float32).split([5, 2])[rank]  # uneven
        metrics.update({"mean": samples.mean(), "sum": samples.sum(), "max": samples.max()}, weight=len(samples))
        mine["metrics"] = metrics.compute()
        fabric.save("metrics.ckpt", {"metrics": metrics})
        resumed = Metrics(fabric, {"mean": "mean", "sum": "sum", "max": "max"})
        fabric.load("metrics.ckpt", {"metrics": resumed})
        mine["resumed metrics"] = resumed.compute(), resumed._partials == metrics._partials

        mine["torchmetrics"] = with_torchmetrics(fabric)

        early = EarlyStopping(fabric, patience=1)
        mine["stops"] = early.update(mine["metrics"]["mean"]), early.update(4.0)
        mine["told"] = error_of(early.update, rank)

# Saved under one strategy, loaded under the other.
for strategy, other in (("ddp", "fsdp"), ("fsdp", "ddp")):
    with Fabric(accelerator="cpu", devices=2, strategy=strategy) as fabric:
        fabric.launch()
        model, optimizer = fabric.setup(*made())
        average = ModelAverage(fabric, model, decay=0.75)
        state = {"model": model, "optimizer": optimizer, "average": average}
        rest = fabric.load(f"{other}.ckpt", state)
        found[strategy]["loaded"] = whole(average.state_dict()["module"]), average.updates, rest
        train(fabric, model, optimizer, average, batches(2))
        found[strategy]["trained on"] = whole(average.state_dict()["module"])
answer(found)
"""
)


@pytest.fixture(scope="module")
def answers(shared_programs: Any) -> list[dict[str, Any]]:
    script = shared_programs.write(PROGRAM)
    finished = shared_programs.run("-W", "error", str(script), timeout=220)
    assert finished.code == 0, finished.err
    assert sorted(finished.answers) == [0, 1], finished.err
    return [finished.answers[0], finished.answers[1]]


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """The same in one process, without us."""
    task: dict[str, Any] = {}
    exec(TASK, task)  # what the ranks run
    model, optimizer = task["made"]()
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.75))
    found: dict[str, Any] = {}

    def train(some: list[torch.Tensor]) -> None:
        for batch in some:
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            averaged.update_parameters(model)

    train(task["batches"]())
    found["average"] = {name: value.clone() for name, value in averaged.module.state_dict().items()}
    found["applied"] = averaged.eval()(task["batches"]()[0]).detach()
    statistics: nn.Module = swa_utils.AveragedModel(model)
    statistics.update_parameters(model)
    swa_utils.update_bn(task["batches"](7, 4), statistics.train())
    found["bn"] = statistics.module.state_dict()
    train(task["batches"](2))
    found["trained on"] = averaged.module.state_dict()
    return found


pytestmark = pytest.mark.timeout(240)  # two processes import PyTorch, and others may be busy

STRATEGIES = pytest.mark.parametrize("strategy", ["ddp", "fsdp"])


@STRATEGIES
def test_the_average_equals_that_of_a_plain_loop(answers: Any, plain: Any, strategy: str) -> None:
    for each in answers:
        torch.testing.assert_close(each[strategy]["average"], plain["average"])
        torch.testing.assert_close(each[strategy]["applied"], plain["applied"])
        assert each[strategy]["own again"]
        assert each[strategy]["back"]
        for name, value in each[strategy]["weights"].items():
            assert torch.equal(value, each[strategy]["average"][name]), name


def test_shards_are_averaged_and_saved_where_they_are(answers: Any) -> None:
    assert [each["fsdp"]["read back"] for each in answers] == [True] * 2
    parameters = 4 * 6 + 6 + 6 + 6 + 6 * 6
    assert [each["ddp"]["held"] for each in answers] == [parameters] * 2
    assert [each["fsdp"]["held"] for each in answers] == [parameters // 2] * 2


@STRATEGIES
def test_statistics_of_batch_norms_are_over_the_batches_of_all_ranks(
    answers: Any, plain: Any, strategy: str
) -> None:
    for each in answers:
        torch.testing.assert_close(each[strategy]["bn"], plain["bn"])


@STRATEGIES
def test_an_average_that_another_strategy_saved_goes_on(answers: Any, plain: Any, strategy: str) -> None:
    other = {"ddp": "fsdp", "fsdp": "ddp"}[strategy]
    for each in answers:
        loaded, updates, rest = each[strategy]["loaded"]
        assert (updates, rest) == (4, {})
        assert loaded.keys() == each[other]["average"].keys()
        assert all(torch.equal(value, each[other]["average"][name]) for name, value in loaded.items())
        torch.testing.assert_close(each[strategy]["trained on"], plain["trained on"])


@STRATEGIES
def test_metrics_are_those_of_all_samples_before_and_after_a_restart(answers: Any, strategy: str) -> None:
    for each in answers:
        assert each[strategy]["metrics"] == {"mean": 3.0, "sum": 21.0, "max": 6.0}
        assert each[strategy]["resumed metrics"] == (each[strategy]["metrics"], True)


@STRATEGIES
def test_metrics_of_torchmetrics_survive_a_restart(answers: Any, strategy: str) -> None:
    for each in answers:
        if each[strategy]["torchmetrics"] is None:
            pytest.skip("not run: torchmetrics is missing (pip install torchmetrics)")
        assert each[strategy]["torchmetrics"] == 1.0 + 2.0 + 2 * 10.0


@STRATEGIES
def test_all_ranks_stop_or_are_told(answers: Any, strategy: str) -> None:
    for each in answers:
        assert each[strategy]["stops"] == (False, True)
        name, message = each[strategy]["told"]
        assert name == "ConfigurationError"
        assert "0.0 on rank 0, 1.0 on rank 1" in message
