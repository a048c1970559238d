"""From the constructor and the command line to one request: agreement, contradiction, and the spellings of old."""

from __future__ import annotations

import json
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from fabric_core import (
    Accelerator,
    AcceleratorSpec,
    ConfigurationError,
    DevicesError,
    Fabric,
    FabricError,
    Inventory,
    Precision,
    PrecisionSpec,
    Registry,
    Request,
    Strategy,
    StrategySpec,
    UnknownPluginError,
    hookimpl,
)
from fabric_core.request import DEFAULTS, RUN_VARIABLE, as_tuple, is_interactive, make_request


class Half(Precision):
    spec = PrecisionSpec("16-mixed", "", aliases=("16",))


class Card(Accelerator):
    spec = AcceleratorSpec("card", "", probe=lambda: Inventory(indices=(0, 1)))

    def device(self, index: int) -> torch.device:
        return torch.device("meta")


class Spread(Strategy):
    spec = StrategySpec("spread", "")


class Unnamed(Strategy):
    pass


class Parts:
    @hookimpl
    def fabric_accelerators(self) -> Iterator[AcceleratorSpec]:
        yield AcceleratorSpec(
            "card",
            Card,
            probe=lambda: Inventory(indices=(0, 1)),
            groups=("gpu",),
            strategies={"many": "spread"},
        )
        yield AcceleratorSpec("chip", Card, probe=lambda: Inventory(indices=(0,)), aliases=("tpu",))

    @hookimpl
    def fabric_strategies(self) -> Iterator[StrategySpec]:
        yield StrategySpec("spread", Spread, supports=("*",), aliases=("spread_out",))

    @hookimpl
    def fabric_precisions(self) -> Iterator[PrecisionSpec]:
        yield PrecisionSpec("16-mixed", Half, aliases=("16",))
        yield PrecisionSpec("16-mixed", Half, aliases=("16",), strategies=("spread",))


@pytest.fixture
def registry(core_alone: Registry) -> Registry:
    core_alone.register(Parts(), distribution="acme", version="1.0")
    return core_alone


def request_of(registry: Registry, run: Any = None, **code: Any) -> Request:
    environ = {} if run is None else {RUN_VARIABLE: run if isinstance(run, str) else json.dumps(run)}
    return make_request(
        {**DEFAULTS, **code}, plugins=None, loggers=None, options={}, environ=environ, registry=registry
    )


# -- the code and the command line --------------------------------------------------------------------------------


def test_without_a_command_line_the_code_decides(registry: Registry) -> None:
    request = request_of(registry, strategy="spread", devices=2)
    assert (request.accelerator, request.strategy, request.devices) == ("auto", "spread", 2)
    assert (request.num_nodes, request.precision) == ("auto", None)


@pytest.mark.parametrize(
    "flags",
    [{"strategy": "spread"}, {"devices": "2", "accelerator": "card"}, {"num_nodes": 2}, {"precision": "16"}],
    ids=str,
)
def test_what_the_code_leaves_open_is_taken_from_the_command_line(
    registry: Registry, flags: dict[str, Any]
) -> None:
    request = request_of(registry, flags)
    for name in DEFAULTS:
        assert getattr(request, name) == flags.get(name, DEFAULTS[name])


@pytest.mark.parametrize(
    ("name", "code", "given"),
    [
        ("strategy", "spread", "spread"),
        ("strategy", "Spread ", "SPREAD"),
        ("strategy", "spread", "spread_out"),
        ("strategy", "spread@acme", "spread"),
        ("strategy", Spread(), "spread"),
        ("strategy", Spread, "Spread"),
        ("accelerator", "chip", "tpu"),
        ("accelerator", Card(), "card"),
        ("accelerator", Card(), "chip"),
        ("precision", 16, "16-mixed"),
        ("precision", "16", "16-MIXED"),
        ("precision", 32, "32-true"),
        ("precision", Half(), "16"),
        ("devices", 2, "2"),
        ("devices", [0, 1], "0,1"),
        ("devices", "0, 1", "0,1"),
        ("devices", None, "0"),
        ("devices", -1, "-1"),
        ("num_nodes", 2, 2),
        ("num_nodes", "2", 2),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_both_say_alike_is_no_contradiction_and_the_code_is_kept(
    registry: Registry, name: str, code: Any, given: Any
) -> None:
    assert getattr(request_of(registry, {name: given}, **{name: code}), name) is code


@pytest.mark.parametrize(
    ("name", "code", "given"),
    [
        ("strategy", "spread", "single_device"),
        ("strategy", Unnamed(), "spread"),
        ("strategy", Unnamed, "spread"),
        ("strategy", f"{__name__}:Spread", "spread"),
        ("accelerator", "cpu", "card"),
        ("accelerator", Card(), "cpu"),
        ("precision", 32, "16"),
        ("precision", Half(), "32"),
        ("devices", 2, "3"),
        ("devices", [0, 1], "2"),
        ("devices", None, "1"),
        ("num_nodes", 1, 2),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_contradiction_names_both_sides(registry: Registry, name: str, code: Any, given: Any) -> None:
    flag = name.replace("_", "-")
    with pytest.raises(ConfigurationError) as caught:
        request_of(registry, {name: given}, **{name: code})
    message = str(caught.value)
    assert f"The code says {name}={code!r}, and the command line says --{flag} {given}." in message
    assert f"leave {name} out of the code" in message


@pytest.mark.parametrize(
    ("name", "code", "given", "error"),
    [
        ("strategy", "spraed", "spread", UnknownPluginError),
        ("strategy", "spread", "spraed", UnknownPluginError),
        ("strategy", Unnamed, "unnamed", UnknownPluginError),
        ("devices", "two", "2", DevicesError),
        ("devices", 2, "two", DevicesError),
    ],
    ids=str,
)
def test_nonsense_on_either_side_is_named_as_such(
    registry: Registry, name: str, code: Any, given: Any, error: type[FabricError]
) -> None:
    with pytest.raises(error, match="spraed|two|unnamed"):
        request_of(registry, {name: given}, **{name: code})


@pytest.mark.parametrize("text", ["", "{", "[]", "2", "null", "nonsense"])
def test_a_variable_that_the_command_has_not_written_is_named(registry: Registry, text: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{RUN_VARIABLE} holds .*Remove it"):
        request_of(registry, text)


def test_the_environment_of_the_process_is_where_the_command_line_speaks(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_VARIABLE, json.dumps({"precision": "16-mixed", "devices": "1"}))
    assert Fabric(accelerator="cpu", precision=16).plan.precision.name == "16-mixed"
    assert Fabric(accelerator="cpu").plan.precision.name == "16-mixed"
    with pytest.raises(ConfigurationError, match="precision=32.*--precision 16-mixed"):
        Fabric(accelerator="cpu", precision=32)


def test_lists_of_parts_are_copied_and_single_ones_taken(registry: Registry) -> None:
    plugins = ["a", "b"]
    request = make_request(
        DEFAULTS, plugins=plugins, loggers="one", options={}, environ={}, registry=registry
    )
    plugins.append("c")
    assert (request.plugins, request.loggers) == (("a", "b"), ("one",))
    assert [as_tuple(value) for value in (None, 3, "ab", [], (1, 2))] == [(), (3,), ("ab",), (), (1, 2)]


# -- the spellings of old -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "accelerator", "devices"),
    [
        ({"gpus": 2}, "card", (0, 1)),
        ({"gpus": -1}, "card", (0, 1)),
        ({"gpus": "2"}, "card", (0, 1)),
        ({"gpus": [1]}, "card", (1,)),
        ({"gpus": "1,"}, "card", (1,)),
        ({"gpus": "auto"}, "card", (0, 1)),
        ({"gpus": 0}, "cpu", (0,)),
        ({"gpus": "0"}, "cpu", (0,)),
        ({"tpu_cores": 1}, "chip", (0,)),
        ({"tpu_cores": 0}, "cpu", (0,)),
    ],
    ids=str,
)
def test_arguments_of_old_are_mapped_with_a_warning_at_the_line_of_the_user(
    registry: Registry, old: dict[str, Any], accelerator: str, devices: tuple[int, ...]
) -> None:
    with pytest.warns(DeprecationWarning, match=r"is deprecated\. Write accelerator=.*devices=") as caught:
        fabric = Fabric(**old)
    assert [warning.filename for warning in caught] == [__file__]
    assert (fabric.plan.accelerator.name, fabric.plan.devices) == (accelerator, devices)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"gpus": 2, "devices": 2}, "gpus=2 is an old way to give devices"),
        ({"gpus": 2, "accelerator": "cpu"}, "gpus=2 is an old way to give accelerator"),
        ({"tpu_cores": 1, "accelerator": "chip", "devices": 1}, "give accelerator and devices"),
    ],
    ids=str,
)
def test_an_argument_of_old_beside_the_new_one_is_refused(
    registry: Registry, flags: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Fabric(**flags)


def test_two_arguments_of_old_are_refused(registry: Registry) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(ConfigurationError, match="tpu_cores=1 is an old way"):
            Fabric(gpus=1, tpu_cores=1)


def test_an_argument_of_old_that_is_none_was_not_given(registry: Registry) -> None:
    assert Fabric(gpus=None, tpu_cores=None, accelerator="cpu").world_size == 1


def test_an_argument_of_old_for_hardware_that_nobody_offers_says_so(core_alone: Registry) -> None:
    with pytest.warns(DeprecationWarning, match="gpus=1"), pytest.raises(UnknownPluginError, match="'gpu'"):
        Fabric(gpus=1)


# -- prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "prompt", "expected"),
    [({"__file__": "train.py"}, False, False), ({}, False, True), ({"__file__": "x.py"}, True, True)],
    ids=["script", "no file", "prompt"],
)
def test_a_prompt_is_where_there_is_no_script_to_start_again(
    monkeypatch: pytest.MonkeyPatch, main: Mapping[str, str], prompt: bool, expected: bool
) -> None:
    import sys

    module = types.ModuleType("__main__")
    for name, value in main.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "__main__", module)
    if prompt:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    else:
        monkeypatch.delattr(sys, "ps1", raising=False)
    assert is_interactive() is expected


def test_a_spawned_process_that_imports_the_script_is_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing
    import sys

    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    assert is_interactive()
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    assert not is_interactive()
