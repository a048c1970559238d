"""The style ``class Trainer(Fabric): def run(self): …``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import (
    Fabric,
    Launcher,
    LauncherSpec,
    LaunchJob,
    Registry,
    SetupError,
    Strategy,
    StrategySpec,
    hookimpl,
)

pytestmark = pytest.mark.usefixtures("core_alone")


class Here(Launcher):
    """Runs the function here, as if this were rank 0 of the job that was asked for."""

    launches = 0

    def launch(self, function: Callable[[], Any], job: LaunchJob) -> Any:
        Here.launches += 1
        variables = {"WORLD_SIZE": job.num_processes, "LOCAL_WORLD_SIZE": job.num_processes}
        ranks = {"RANK": 0, "LOCAL_RANK": 0, "NODE_RANK": 0, "FABRIC_LAUNCHED": 1}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (variables | ranks).items():
                patch.setenv(name, str(value))
            return function()


class Many(Strategy):
    pass


class Parts:
    @hookimpl
    def fabric_strategies(self) -> Iterator[StrategySpec]:
        yield StrategySpec("many", Many, supports=("*",), volunteers_for=("many",), launcher="here")

    @hookimpl
    def fabric_launchers(self) -> Iterator[LauncherSpec]:
        yield LauncherSpec("here", Here, interactive=True, needs_function=True)


@pytest.fixture
def launches(core_alone: Registry, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often something was launched."""
    core_alone.register(Parts(), distribution="acme", version="1.0")
    monkeypatch.setattr(Here, "launches", 0)
    return lambda: Here.launches


class Trainer(Fabric):
    """Documented."""

    def run(self, steps: int, *, lr: float = 0.1) -> Any:
        """Train."""
        model = nn.Linear(2, 1)
        with torch.no_grad():
            model.weight.fill_(1.0)
        model, optimizer = self.setup(model, torch.optim.SGD(model.parameters(), lr=lr))
        for _ in range(steps):
            self.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
            optimizer.zero_grad()
        return round(model.weight[0, 0].item(), 6)


def test_a_subclass_trains_by_its_run_method() -> None:
    trainer = Trainer(accelerator="cpu")
    assert trainer.run(3) == 0.7
    assert trainer.run(steps=1, lr=0.5) == 0.5  # a second run needs no second launch


def test_run_keeps_its_signature_and_its_documentation() -> None:
    assert list(inspect.signature(Trainer.run).parameters) == ["self", "steps", "lr"]
    assert Trainer.run.__doc__ == "Train."


def test_run_launches_what_has_to_be_launched_once(launches: Callable[[], int]) -> None:
    trainer = Trainer(accelerator="cpu", devices=2)
    assert trainer.run(3) == 0.7
    assert launches() == 1
    with pytest.raises(SetupError, match="close"):
        trainer.run(3)


def test_run_that_was_launched_by_hand_launches_nothing_more(launches: Callable[[], int]) -> None:
    trainer = Trainer(accelerator="cpu", devices=2)
    assert trainer.launch(Trainer.run, 3) == 0.7
    assert launches() == 1


def test_subclasses_of_subclasses_launch_once_and_reach_their_parents(launches: Callable[[], int]) -> None:
    class Louder(Trainer):
        def __init__(self, words: str, **options: Any) -> None:
            super().__init__(**options)
            self.words = words

        def run(self, steps: int) -> Any:  # type: ignore[override]
            return self.words, super().run(steps)

    class Inheriting(Louder):
        pass

    assert Louder("hello", accelerator="cpu", devices=2).run(3) == ("hello", 0.7)
    assert launches() == 1
    assert Inheriting("hi", accelerator="cpu", devices=2).run(3) == ("hi", 0.7)
    assert launches() == 2


def test_a_run_method_may_come_from_a_mixin(launches: Callable[[], int]) -> None:
    class Running:
        def run(self) -> int:
            return self.all_reduce(1).numel()  # type: ignore[attr-defined, no-any-return]

    class Mixed(Running, Fabric):
        pass

    assert Mixed(accelerator="cpu", devices=2).run() == 1
    assert launches() == 1
    assert Running.run is vars(Running)["run"]
    assert not hasattr(Running.run, "__wrapped__")


def test_a_subclass_without_run_is_a_fabric_like_any_other() -> None:
    class Plain(Fabric):
        run = None
        greeting = "hello"

    plain = Plain(accelerator="cpu")
    assert (plain.run, plain.greeting, plain.world_size) == (None, "hello", 1)
    assert not hasattr(Fabric, "run")


def test_arguments_of_class_creation_reach_the_users_base() -> None:
    class Keyed:
        keys: list[str] = []

        def __init_subclass__(cls, key: str = "", **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            cls.keys.append(key)

    class Both(Fabric, Keyed, key="mine"):
        pass

    assert Both.keys == ["mine"]


def test_verbs_can_be_overridden() -> None:
    class Halving(Trainer):
        def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
            super().backward(loss / 2, *args, **kwargs)

    assert Halving(accelerator="cpu").run(2) == 0.9


def test_an_error_in_run_is_the_users_and_closes_as_failed(launches: Callable[[], int]) -> None:
    class Logger:
        def log_metrics(self, metrics: Any, step: Any) -> None: ...

        def finalize(self, status: str) -> None:
            statuses.append(status)

    class Failing(Fabric):
        def run(self) -> None:
            raise ZeroDivisionError

    statuses: list[str] = []
    with pytest.raises(ZeroDivisionError):
        Failing(accelerator="cpu", devices=2, loggers=Logger()).run()
    assert statuses == ["failed"]
