"""Parts passed as instances and classes: they are the same parts as their names mean."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest

from fabric_backends.environments.torchelastic import TorchElasticEnvironment
from fabric_backends.launchers.function import ForkLauncher, SpawnLauncher
from fabric_backends.precisions.true import TruePrecision
from fabric_backends.strategies.ddp import DDPStrategy
from fabric_core import ConfigurationError, Plan, Registry, UnknownPluginError
from fabric_core.request import make_request
from fabric_core.resolve import resolve


def plan_of(*, given: str = "{}", plugins: Any = None, interactive: bool = False, **code: Any) -> Plan:
    """The plan for two devices, by what the code says and what ``fabric run`` was given."""
    flags = {"accelerator": "cpu", "strategy": "auto", "devices": 2, "num_nodes": "auto", "precision": None}
    environ, registry = {"FABRIC_RUN": given}, Registry(environ={})
    request = make_request(
        {**flags, **code}, plugins=plugins, loggers=None, options={}, environ=environ, registry=registry
    )
    return resolve(request, registry)


class Mine(DDPStrategy):
    """What derives from a part and does not say otherwise."""


@pytest.mark.parametrize("strategy", [DDPStrategy(), DDPStrategy, Mine(), Mine])
def test_a_strategy_in_code_has_the_launcher_of_its_name(strategy: Any) -> None:
    plan = plan_of(strategy=strategy)
    assert plan.launcher is not None
    assert plan.launcher.name == "script"


@pytest.mark.parametrize(("launcher", "interactive"), [(ForkLauncher(), True), (SpawnLauncher, False)])
def test_a_launcher_in_code_is_known_to_need_a_function(launcher: Any, interactive: bool) -> None:
    plan = plan_of(strategy="ddp", plugins=launcher)
    assert plan.launcher is not None
    assert (plan.launcher.spec.needs_function, plan.launcher.spec.interactive) == (True, interactive)


def test_an_environment_in_code_detects_the_size_of_the_job() -> None:
    registry = Registry(environ={})
    flags = {
        "accelerator": "cpu",
        "strategy": "auto",
        "devices": "auto",
        "num_nodes": "auto",
        "precision": None,
    }
    job = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "6"}
    environment = TorchElasticEnvironment()
    request = make_request(
        flags, plugins=environment, loggers=None, options={}, environ=job, registry=registry
    )
    plan = resolve(request, registry)
    assert (plan.processes_per_node, plan.num_nodes) == (3, 2)


PATH = "fabric_backends.strategies.ddp:DDPStrategy"


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        *((DDPStrategy(find_unused_parameters=True), name) for name in ("ddp", "DDP", "ddp_spawn", PATH)),
        (DDPStrategy, "ddp_fork"),
        (Mine(), "ddp"),
    ],
)
def test_a_strategy_in_code_agrees_with_its_names_on_the_command_line(strategy: Any, name: str) -> None:
    plan = plan_of(strategy=strategy, given=f'{{"strategy": "{name}"}}', plugins="script")
    assert issubclass(plan.strategy.spec.target, DDPStrategy)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "code",
    [
        {"strategy": DDPStrategy(), "given": '{"strategy": "ddp_find_unused_parameters_true"}'},
        {"strategy": DDPStrategy(), "given": '{"strategy": "single_device"}'},
        {"precision": TruePrecision("float16"), "given": '{"precision": "64-true"}'},
        {"precision": TruePrecision("float16"), "given": '{"precision": "32"}'},
    ],
)
def test_a_part_in_code_does_not_stand_for_a_preset_with_options(code: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="Make them agree"):
        plan_of(**code)


def test_a_name_on_the_command_line_that_nobody_has_is_named() -> None:
    with pytest.raises(UnknownPluginError, match="Did you mean 'ddp'"):
        plan_of(strategy=DDPStrategy(), given='{"strategy": "ddpp"}')


PROGRAM = """
import sys
import torch
from fabric_backends.launchers.function import ForkLauncher
from fabric_backends.strategies.ddp import DDPStrategy
from fabric_core import Fabric

def train(fabric):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(4, 1), "unused": torch.nn.Linear(4, 1)})
    model.forward = model["used"].forward
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        torch.manual_seed(fabric.global_rank)
        fabric.backward(model(torch.randn(2, 4)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return fabric.world_size, model["used"].weight.detach().clone()

def main():
    plugins = {"script": None, "fork": ForkLauncher(), "run": None}[sys.argv[1]]
    strategy = DDPStrategy(find_unused_parameters=True)
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=2, plugins=plugins)
    if sys.argv[1] == "fork":
        result = fabric.launch(train)
    else:
        fabric.launch()
        result = train(fabric)
    if fabric.global_rank == 0:
        torch.save(result, "answer-0")

if __name__ == "__main__":
    main()
"""


def plain_loop() -> Any:
    """The same steps in plain PyTorch, on the batches of both ranks."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            for rank in range(2):
                torch.manual_seed(rank)
                (model(torch.randn(2, 4)).square().mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.weight.detach()


@pytest.mark.parametrize("how", ["script", "fork", "run"])
def test_an_instance_of_the_strategy_trains_on_two_processes(programs: Any, how: str) -> None:
    script = str(programs.write(textwrap.dedent(PROGRAM), preamble=""))
    start = ("-m", "fabric_core", "run", "--strategy=ddp", "--devices=2") if how == "run" else ()
    finished = programs.run(*start, script, how, timeout=100)
    assert finished.code == 0, finished.err
    world_size, weight = finished.answers[0]
    assert world_size == 2
    assert (weight - plain_loop()).abs().max() <= 1e-6
