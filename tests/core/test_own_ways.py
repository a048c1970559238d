"""What a strategy may do in its own way: windows, batches, gradients that are dropped, state that only it can read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fabric_core import (
    AcceleratorSpec,
    ClusterEnvironmentSpec,
    Detection,
    Fabric,
    Inventory,
    LauncherSpec,
    PrecisionSpec,
    SetupError,
    Strategy,
    StrategySpec,
    UnsupportedError,
    unwrap,
)

if TYPE_CHECKING:
    from conftest import Shelf


class Own(Strategy):
    """One process that notes what it is asked for."""

    spec = StrategySpec("own", "", supports=("cpu",))

    def __init__(self) -> None:
        self.seen: list[Any] = []

    @contextmanager
    def accumulation_context(self, module: nn.Module, is_last: bool) -> Iterator[None]:
        self.seen.append((module, is_last))
        yield
        self.seen.append("done")

    def hold_gradient_sync(self, module: nn.Module) -> AbstractContextManager[Any] | None:
        return None

    def zero_gradients(self, optimizer: Any, zero_grad: Any, *args: Any, **kwargs: Any) -> None:
        self.seen.append((optimizer, args, kwargs))
        zero_grad(*args, **kwargs)

    def move_batches(self, batches: Iterator[Any], move: Any) -> Iterator[Any]:
        for batch in batches:
            yield move(batch) + 1


@pytest.fixture
def own() -> Iterator[tuple[Fabric, Own]]:
    strategy = Own()
    with Fabric(accelerator="cpu", strategy=strategy) as fabric:
        yield fabric, strategy


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_strategy_learns_which_micro_batch_is_the_last_of_its_window(own: tuple[Fabric, Own]) -> None:
    fabric, strategy = own
    raw = nn.Linear(1, 1)
    model = fabric.setup(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # whoever accumulates has not asked to hold anything back
        for _ in range(3):
            with fabric.accumulate(model, every=3):
                fabric.backward(model(torch.ones(1, 1)).sum())
    assert strategy.seen == [(raw, False), "done", (raw, False), "done", (raw, True), "done"]


def test_a_strategy_may_drop_gradients_itself(own: tuple[Fabric, Own]) -> None:
    fabric, strategy = own
    raw = nn.Linear(1, 1)
    optimizer = sgd(raw)
    model, ready = fabric.setup(raw, optimizer)
    fabric.backward(model(torch.ones(1, 1)).sum())
    ready.zero_grad(set_to_none=False)
    assert strategy.seen == [(optimizer, (), {"set_to_none": False})]
    assert raw.weight.grad is not None
    assert raw.weight.grad.item() == 0.0


def test_a_strategy_may_bring_batches_to_the_device_itself(own: tuple[Fabric, Own]) -> None:
    fabric, _ = own
    loader = fabric.setup_dataloaders(DataLoader(torch.arange(4), batch_size=2))
    assert [batch.tolist() for batch in loader] == [[1, 2], [3, 4]]
    assert [batch.tolist() for batch in loader] == [[1, 2], [3, 4]], "in every loop"
    stays = fabric.setup_dataloaders(DataLoader(torch.arange(4), batch_size=2), move_to_device=False)
    assert [batch.tolist() for batch in stays] == [[0, 1], [2, 3]]


def test_running_ahead_moves_no_position_and_loses_no_batch() -> None:
    class Ahead(Strategy):
        spec = StrategySpec("ahead", "", supports=("cpu",))

        def move_batches(self, batches: Iterator[Any], move: Any) -> Iterator[Any]:
            waiting: list[Any] = []
            for batch in batches:
                waiting.append(move(batch))
                if len(waiting) == 2:
                    yield waiting.pop(0)
            yield from waiting

    with Fabric(accelerator="cpu", strategy=Ahead()) as fabric:
        loader = fabric.setup_dataloaders(DataLoader(torch.arange(5)))
        seen = [(loader.position, batch.item(), loader.is_last_batch) for batch in loader]
    assert seen == [(0, 0, False), (1, 1, False), (2, 2, False), (3, 3, False), (4, 4, True)]


def test_a_model_that_is_changed_in_place_is_guarded_like_one_that_is_wrapped() -> None:
    class InPlace(Strategy):
        spec = StrategySpec("in_place", "", supports=("cpu",))
        forward_only = True

    class Net(nn.Linear):
        def other_way(self, x: torch.Tensor) -> torch.Tensor:
            return self(x) if self.training is None else nn.Linear.__call__(unwrap(self), x)

    with Fabric(accelerator="cpu", strategy=InPlace()) as fabric:
        model = fabric.setup(Net(1, 1))
        assert model(torch.ones(1, 1)).requires_grad
        with pytest.raises(SetupError, match=r"Net\.other_way\(\) calls Net\(\) outside of the forward pass"):
            model.other_way(torch.ones(1, 1))
        model.mark_forward_method("other_way")
        assert model.other_way(torch.ones(1, 1)).requires_grad


def test_an_optimizer_apart_from_its_model_is_refused_and_a_model_alone_is_not() -> None:
    class Joint(Strategy):
        spec = StrategySpec("joint", "", supports=("cpu",))
        joint_setup = True

    with Fabric(accelerator="cpu", strategy=Joint()) as fabric:
        raw = nn.Linear(1, 1)
        assert unwrap(fabric.setup_module(raw)) is raw
        with pytest.raises(SetupError, match=r"setup_optimizers\(\) does it apart"):
            fabric.setup_optimizers(sgd(raw))


class Handle:
    """A state that only the strategy can read."""

    def __init__(self, module: nn.Module | None = None) -> None:
        self.module = module


def _weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


class Engine(Strategy):
    """Writes weights to a place of its own, and reads them when they are restored."""

    spec = StrategySpec("engine", "", supports=("cpu",))

    def __init__(self) -> None:
        self.stored: dict[str, Any] = {}

    def module_state_dict(self, module: nn.Module) -> Any:
        return Handle(module)

    def save_checkpoint(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        for key, value in checkpoint.items():
            stands_in = isinstance(value, Handle) and value.module is not None
            self.stored[key] = _weights(value.module) if stands_in else value

    def load_checkpoint(self, path: Path, *, weights_only: bool = True) -> dict[str, Any]:
        return {key: Handle() if isinstance(value, dict) else value for key, value in self.stored.items()}

    def load_module_state_dict(self, module: nn.Module, state: Any, strict: bool = True) -> None:
        assert isinstance(state, Handle)
        module.load_state_dict(self.stored["model"], strict=strict)

    def plain_value(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: self.stored[key] if isinstance(entry, Handle) else entry for key, entry in value.items()}


def test_a_strategy_reads_its_own_form_of_state_and_turns_the_rest_into_plain_values() -> None:
    strategy = Engine()
    with Fabric(accelerator="cpu", strategy=strategy) as fabric:
        raw = nn.Linear(1, 1)
        model = fabric.setup(raw)
        before = {name: value.clone() for name, value in raw.state_dict().items()}
        fabric.save("anywhere", {"model": model, "step": 3})
        nn.init.zeros_(raw.weight)
        assert fabric.load("anywhere", {"model": model}) == {"step": 3}
        assert torch.equal(raw.weight, before["weight"])
        whole = fabric.load("anywhere")
        assert whole["step"] == 3
        assert torch.equal(whole["model"]["weight"], before["weight"])
        rest = fabric.load("anywhere", {"step": 0})
        assert torch.equal(rest["model"]["bias"], before["bias"])


# -- what a strategy says it can work with ---------------------------------------------------------------------------

TARGET = "a.module:Class"
PICKY = StrategySpec("picky", TARGET, supports=("*",), precisions=("32-true", "Half"))


def test_a_precision_that_a_strategy_does_not_list_is_refused(shelf: Shelf) -> None:
    shelf.put("x", PICKY, PrecisionSpec("half", TARGET), PrecisionSpec("octal", TARGET, aliases=("oct",)))
    assert shelf.plan(strategy="picky").precision.name == "32-true"
    assert shelf.plan(strategy="picky", precision="half").precision.name == "half"
    with pytest.raises(
        UnsupportedError, match=r"'picky' cannot work with the precision 'octal'. It works with 32-true, Half"
    ):
        shelf.plan(strategy="picky", precision="oct")


def test_a_precision_that_is_made_for_a_strategy_need_not_be_listed(shelf: Shelf) -> None:
    shelf.put("x", PICKY, PrecisionSpec("octal", TARGET, strategies=("picky",)))
    assert shelf.plan(strategy="picky", precision="octal").precision.name == "octal"


def test_a_strategy_that_lists_no_precisions_works_with_any(shelf: Shelf) -> None:
    shelf.put("x", StrategySpec("easy", TARGET, supports=("*",)), PrecisionSpec("octal", TARGET))
    assert shelf.plan(strategy="easy", precision="octal").precision.name == "octal"


def job(started: int, own_devices: bool) -> ClusterEnvironmentSpec:
    found = Detection(started, 1, "made up", own_devices=own_devices)
    return ClusterEnvironmentSpec("job", TARGET, detect=lambda _: found)


UNIT = AcceleratorSpec("unit", TARGET, probe=lambda: Inventory((0,)), priority=10)
SPREAD = StrategySpec("spread", TARGET, supports=("*",), volunteers_for=("many",), launcher="starter")


@pytest.mark.parametrize("devices", ["auto", 4, "4", -1])
def test_processes_that_see_only_their_own_device_call_it_the_first(shelf: Shelf, devices: Any) -> None:
    shelf.put("x", UNIT, SPREAD, LauncherSpec("starter", TARGET), job(4, own_devices=True))
    plan = shelf.plan(devices=devices)
    assert (plan.devices, plan.processes_per_node, plan.strategy.name) == ((0, 0, 0, 0), 4, "spread")
    assert plan.device_reason == "each of 4 process(es) sees one device of its own"


def test_processes_that_see_all_devices_do_not_share_one(shelf: Shelf) -> None:
    shelf.put("x", UNIT, SPREAD, LauncherSpec("starter", TARGET), job(4, own_devices=False))
    with pytest.raises(ValueError, match="has started 4"):
        shelf.plan()
