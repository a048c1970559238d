"""The resolver: which part for which flags, on machines and with plugins that are made up here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from fabric_core import (
    AcceleratorSpec,
    CheckpointIOSpec,
    ClusterEnvironment,
    ClusterEnvironmentSpec,
    Detection,
    Inventory,
    LauncherSpec,
    LoggerSpec,
    Plan,
    Precision,
    PrecisionSpec,
    Strategy,
    StrategySpec,
)
from fabric_core.errors import (
    AmbiguousPluginError,
    BrokenPluginError,
    ConfigurationError,
    ContractVersionError,
    DevicesError,
    MissingRequirementError,
    OptionsError,
    UnknownPluginError,
    UnsupportedError,
    WrongTypeError,
)
from fabric_core.registry.registry import Problem

if TYPE_CHECKING:
    from conftest import Shelf

TARGET = "a.module:Class"


def has(count: int, note: str = "") -> Callable[[], Inventory]:
    """A probe that finds so many devices."""
    return lambda: Inventory(indices=tuple(range(count)), note=note)


def broken_probe() -> Inventory:
    raise OSError("the driver does not answer")


def device(name: str, count: int = 0, **more: Any) -> AcceleratorSpec:
    return AcceleratorSpec(name, TARGET, **{"probe": has(count), "priority": 10, **more})


def strategy(name: str, **more: Any) -> StrategySpec:
    return StrategySpec(name, TARGET, **{"supports": ("*",), "launcher": "starter", **more})


def lost(plan: Plan, kind: str) -> dict[str, str]:
    return dict(next(part for part in plan if part.kind == kind).lost)


SPREAD = strategy("spread", volunteers_for=("many", "many_nodes"))
STARTER = LauncherSpec("starter", TARGET)


# -- nothing but the core -------------------------------------------------------------------------------------------


def test_the_core_alone_trains_one_process_on_the_cpu(shelf: Shelf) -> None:
    plan = shelf.plan()
    assert [(part.kind, part.name) for part in plan] == [
        ("accelerator", "cpu"),
        ("strategy", "single_device"),
        ("precision", "32-true"),
        ("cluster environment", "local"),
        ("checkpoint io", "torch_file"),
    ]
    assert (plan.devices, plan.world_size, plan.launcher, plan.warnings) == ((0,), 1, None, ())


def test_every_choice_has_a_reason(shelf: Shelf) -> None:
    shelf.put("x", device("unit", 4), SPREAD, STARTER, LoggerSpec("log", TARGET))
    for flags in ({}, {"devices": 2}, {"accelerator": "cpu", "devices": 3, "loggers": ("log",)}):
        plan = shelf.plan(**flags)
        assert all(part.reason for part in plan)
        assert plan.device_reason


def test_several_devices_without_a_strategy_for_them_are_answered_with_what_to_install(shelf: Shelf) -> None:
    with pytest.raises(
        UnsupportedError, match=r"No installed strategy volunteers for 2 device\(s\) on 1 node"
    ):
        shelf.plan(devices=2)


# -- accelerators ----------------------------------------------------------------------------------------------------


def test_auto_passes_over_devices_that_only_stand_in_for_others(shelf: Shelf) -> None:
    def probe() -> Inventory:
        return Inventory((0,), note="for trying out", only_by_name=True)

    shelf.put("x", device("toy", probe=probe, priority=50, groups=("toys",)))
    plan = shelf.plan()
    assert plan.accelerator.name == "cpu"
    assert dict(plan.accelerator.lost)["toy"] == "has to be asked for by name (for trying out)"
    assert shelf.plan(accelerator="toy").accelerator.name == "toy"
    assert shelf.plan(accelerator="toys").accelerator.name == "toy"


def test_auto_takes_the_available_accelerator_of_the_highest_priority(shelf: Shelf) -> None:
    shelf.put("x", device("slow", 2, priority=1), device("fast", 2, priority=5), device("absent", priority=9))
    shelf.put("y", SPREAD, STARTER)
    plan = shelf.plan()
    assert plan.accelerator.name == "fast"
    assert plan.devices == (0, 1)
    assert lost(plan, "accelerator") == {
        "absent": "not there",
        "slow": "has a lower priority",
        "cpu": "has a lower priority",
    }


def test_auto_spares_the_probes_of_what_cannot_win(shelf: Shelf) -> None:
    shelf.put("x", device("fast", 1), device("slow", probe=broken_probe, priority=1))
    assert shelf.plan().accelerator.name == "fast"


def test_any_hardware_comes_before_the_cpu(shelf: Shelf) -> None:
    shelf.put("x", device("zzz", 1, priority=0))
    assert shelf.plan().accelerator.name == "zzz"


def test_auto_does_not_choose_between_equals(shelf: Shelf) -> None:
    shelf.put("a", device("one", 1)).put("b", device("two", 1))
    with pytest.raises(AmbiguousPluginError, match=r"accelerator='auto' cannot choose between one@a, two@b"):
        shelf.plan()
    assert shelf.plan(accelerator="two").accelerator.name == "two"


def test_auto_passes_over_what_the_named_strategy_rejects(shelf: Shelf) -> None:
    shelf.put("x", device("unit", 2, groups=("gpu",)), strategy("picky", rejects=("GPU",)), STARTER)
    plan = shelf.plan(strategy="picky")
    assert plan.accelerator.name == "cpu"
    assert lost(plan, "accelerator")["unit"] == "the strategy 'picky' cannot work with it"


def test_auto_does_not_fall_back_behind_a_broken_probe(shelf: Shelf) -> None:
    shelf.put("x", device("unit", probe=broken_probe))
    with pytest.raises(BrokenPluginError) as caught:
        shelf.plan()
    told = str(caught.value)
    for part in (
        "fall back to 'cpu'",
        "unit@x",
        "the driver does not answer",
        "FABRIC_AUTO_FALLBACK=1",
        "DENY",
    ):
        assert part in told
    assert shelf.plan({"FABRIC_AUTO_FALLBACK": "1"}).accelerator.name == "cpu"
    assert shelf.plan(accelerator="cpu").accelerator.name == "cpu", "an explicit name is no fallback"
    assert shelf.plan(devices=None).accelerator.name == "cpu"


def test_auto_does_not_fall_back_behind_a_plugin_that_could_not_be_imported(shelf: Shelf) -> None:
    shelf.problems.append(Problem("acme", "RuntimeError: no", hides_accelerators=True))
    with pytest.raises(BrokenPluginError, match=r"acme \(RuntimeError: no\)"):
        shelf.plan()
    shelf.problems[:] = [Problem("acme", "RuntimeError: no", hides_accelerators=False)]
    assert shelf.plan().accelerator.name == "cpu"


def test_absent_hardware_and_missing_packages_are_no_faults(shelf: Shelf) -> None:
    shelf.put("x", device("gone"), device("bare", 1, requires=("nobody-has-this>=2",)))
    plan = shelf.plan()
    assert plan.accelerator.name == "cpu"
    assert lost(plan, "accelerator") == {"gone": "not there", "bare": "needs nobody-has-this>=2"}


def test_a_probe_that_answers_garbage_is_broken(shelf: Shelf) -> None:
    shelf.put("x", device("unit", probe=lambda: 3))
    with pytest.raises(
        BrokenPluginError, match="The probe of accelerator 'unit' returned 3, which is no Inventory"
    ):
        shelf.plan(accelerator="unit")


def test_a_named_accelerator_raises_the_original_cause(shelf: Shelf) -> None:
    shelf.put("x", device("unit", probe=broken_probe))
    with pytest.raises(BrokenPluginError, match="OSError: the driver does not answer") as caught:
        shelf.plan(accelerator="unit")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_named_accelerator_that_is_not_here_is_an_error(shelf: Shelf) -> None:
    shelf.put("x", device("unit", probe=has(0, "no driver")))
    with pytest.raises(DevicesError, match="accelerator='unit' was asked for, .* here: no driver"):
        shelf.plan(accelerator="Unit")


def test_a_named_accelerator_says_what_to_install_before_it_is_probed(shelf: Shelf) -> None:
    shelf.put("x", device("unit", probe=broken_probe, requires=("nobody-has-this",)))
    with pytest.raises(MissingRequirementError, match="pip install 'nobody-has-this'"):
        shelf.plan(accelerator="unit")


def test_a_group_is_resolved_among_its_members_that_are_here(shelf: Shelf) -> None:
    shelf.put("x", device("absent", groups=("gpu",), priority=20), device("here", 1, groups=("gpu",)))
    shelf.put("y", device("other", 1, priority=30))
    plan = shelf.plan(accelerator="GPU")
    assert plan.accelerator.name == "here"
    assert lost(plan, "accelerator") == {"absent": "not there"}
    assert shelf.plan(accelerator="gpu@x").accelerator.name == "here"


def test_a_group_without_a_member_here_is_an_error(shelf: Shelf) -> None:
    shelf.put("x", device("absent", groups=("gpu",)))
    with pytest.raises(
        DevicesError, match=r"accelerator='gpu' .* no such device is here: absent \(not there\)"
    ):
        shelf.plan(accelerator="gpu")


def test_a_group_does_not_fall_back_behind_a_broken_member(shelf: Shelf) -> None:
    shelf.put(
        "x",
        device("dead", probe=broken_probe, groups=("gpu",), priority=20),
        device("ok", 1, groups=("gpu",)),
    )
    with pytest.raises(BrokenPluginError, match="would fall back to 'ok'"):
        shelf.plan(accelerator="gpu")


def test_an_alias_is_as_good_as_the_name(shelf: Shelf) -> None:
    shelf.put("x", device("unit", 1, aliases=("Old_Name",)))
    assert shelf.plan(accelerator="old_name").accelerator.name == "unit"


@pytest.mark.parametrize("devices", [None, 0, "0"])
def test_no_devices_mean_the_cpu_whatever_is_here(shelf: Shelf, devices: Any) -> None:
    shelf.put("x", device("unit", 4))
    plan = shelf.plan(devices=devices)
    assert (plan.accelerator.name, plan.devices) == ("cpu", (0,))
    with pytest.raises(DevicesError, match="means one process on the CPU"):
        shelf.plan(devices=devices, accelerator="unit")


# -- devices ---------------------------------------------------------------------------------------------------------


def test_auto_devices_fit_the_strategy_that_was_named(shelf: Shelf) -> None:
    shelf.put("x", device("unit", 8), SPREAD, STARTER)
    assert shelf.plan(strategy="single_device").devices == (0,)
    assert shelf.plan(strategy="spread").devices == tuple(range(8))


def test_auto_devices_fit_the_accelerator(shelf: Shelf) -> None:
    shelf.put("x", device("unit", 8, max_devices=1))
    assert shelf.plan().devices == (0,)
    with pytest.raises(UnsupportedError, match="can use at most 1 device"):
        shelf.put("y", SPREAD, STARTER).plan(devices=2)


def test_more_devices_than_a_strategy_can_use_are_an_error(shelf: Shelf) -> None:
    shelf.put("x", device("unit", 8))
    with pytest.raises(UnsupportedError, match=r"at most 1 device\(s\), but 2 \* 1 = 2 were asked for"):
        shelf.plan(strategy="single_device", devices=2)


def test_a_strategy_that_drives_all_devices_has_one_process(shelf: Shelf) -> None:
    shelf.put("x", device("unit", 4), strategy("whole", processes="single", launcher=None))
    plan = shelf.plan(strategy="whole")
    assert (plan.devices, plan.processes_per_node, plan.world_size) == ((0, 1, 2, 3), 1, 1)


@pytest.mark.parametrize("asked", [0, -1, "two", 1.5, True, None, ""])
def test_a_number_of_nodes_that_makes_no_sense_is_an_error(shelf: Shelf, asked: Any) -> None:
    with pytest.raises(ConfigurationError, match="num_nodes=.* has to be a whole number from 1"):
        shelf.plan(num_nodes=asked)


# -- strategies ------------------------------------------------------------------------------------------------------


def test_auto_asks_for_volunteers_by_situation(shelf: Shelf) -> None:
    shelf.put(
        "x",
        device("unit", 4),
        SPREAD,
        strategy("prompt", volunteers_for=("notebook",)),
        STARTER,
        LauncherSpec("able", TARGET, interactive=True),
    )
    assert shelf.plan(devices=1).strategy.name == "single_device"
    assert shelf.plan(devices=2).strategy.name == "spread"
    assert shelf.plan(devices=1, num_nodes=2).strategy.name == "spread"
    shelf.put("z", strategy("prompt_able", volunteers_for=("notebook",), priority=5, launcher="able"))
    plan = shelf.plan(devices=2, interactive=True)
    assert (plan.strategy.name, plan.launcher and plan.launcher.name) == ("prompt_able", "able")
    assert lost(plan, "strategy") == {"prompt": "volunteers with a lower priority"}


def test_among_volunteers_the_one_that_vouches_for_the_device_comes_first(shelf: Shelf) -> None:
    shelf.put("a", device("unit", 2), STARTER)
    shelf.put("b", strategy("vague", supports=(), volunteers_for=("many",)))
    shelf.put("c", strategy("sure", supports=("unit",), volunteers_for=("many",)))
    plan = shelf.plan()
    assert plan.strategy.name == "sure"
    assert lost(plan, "strategy") == {"vague": "volunteers with a lower priority"}


def test_volunteers_that_cannot_do_it_are_passed_over_with_the_reason(shelf: Shelf) -> None:
    many: Any = ("many",)
    shelf.put(
        "x",
        device("unit", 4),
        STARTER,
        strategy("hates", volunteers_for=many, priority=3, rejects=("unit",)),
        strategy("small", volunteers_for=many, priority=3, max_devices=2),
        strategy("bare", volunteers_for=many, priority=3, requires=("nobody-has-this",)),
        strategy("works", volunteers_for=many),
    )
    plan = shelf.plan()
    assert plan.strategy.name == "works"
    assert lost(plan, "strategy") == {
        "hates": "cannot work with 'unit'",
        "small": "uses at most 2 device(s)",
        "bare": "needs nobody-has-this",
    }


def test_auto_does_not_choose_between_equal_volunteers(shelf: Shelf) -> None:
    shelf.put("a", device("unit", 2), SPREAD, STARTER).put("b", strategy("rival", volunteers_for=("many",)))
    with pytest.raises(AmbiguousPluginError, match="strategy='auto' cannot choose between rival@b, spread@a"):
        shelf.plan()


def test_the_wish_of_the_accelerator_comes_before_the_volunteers(shelf: Shelf) -> None:
    unit = device("unit", 4, strategies={"many": "Own", "one": "own_single"})
    shelf.put("a", unit, SPREAD, STARTER, strategy("own", supports=()), strategy("own_single", supports=()))
    plan = shelf.plan()
    assert (plan.strategy.name, plan.warnings) == ("own", ())
    assert lost(plan, "strategy") == {"spread": "'unit' wants another"}
    assert shelf.plan(devices=1).strategy.name == "own_single"


def test_a_wish_that_is_not_installed_is_an_error(shelf: Shelf) -> None:
    shelf.put("a", device("unit", 2, strategies={"many": "gone"}), SPREAD, STARTER)
    with pytest.raises(UnknownPluginError, match="No strategy is named 'gone'"):
        shelf.plan()


def test_a_strategy_that_rejects_the_accelerator_is_an_error(shelf: Shelf) -> None:
    shelf.put("a", device("unit", 2, groups=("gpu",)), strategy("picky", rejects=("gpu",)), STARTER)
    with pytest.raises(
        UnsupportedError, match="'picky' cannot work with the accelerator 'unit': it rejects gpu"
    ):
        shelf.plan(accelerator="unit", strategy="picky")


@pytest.mark.parametrize(
    ("supports", "wishes", "warned"),
    [
        ((), {}, True),
        (("other",), {}, True),
        (("unit",), {}, False),
        (("GPU",), {}, False),
        (("*",), {}, False),
        ((), {"many": "STRANGE"}, False),
        ((), {"one": "strange@a"}, False),
    ],
)
def test_a_pair_that_nobody_vouches_for_runs_with_a_warning(
    shelf: Shelf, supports: tuple[str, ...], wishes: Any, warned: bool
) -> None:
    shelf.put("a", device("unit", 2, groups=("gpu",), strategies=wishes), STARTER)
    shelf.put("b", strategy("strange", supports=supports))
    plan = shelf.plan(accelerator="unit", strategy="strange")
    assert bool(plan.warnings) == warned
    if warned:
        assert "says that they work together" in plan.warnings[0]


def test_a_launcher_is_chosen_only_where_processes_have_to_be_started(shelf: Shelf) -> None:
    shelf.put("x", device("unit", 4), SPREAD, STARTER, LauncherSpec("mine", TARGET))
    plan = shelf.plan(devices=2)
    assert plan.launcher is not None
    assert (plan.launcher.name, plan.launcher.reason) == ("starter", "'spread' starts its processes so")
    assert shelf.plan(devices=1).launcher is None
    mine = shelf.plan(devices=2, plugins=("mine",)).launcher
    assert mine is not None
    assert mine.name == "mine"


def test_a_notebook_is_told_which_strategies_work_there(shelf: Shelf) -> None:
    shelf.put("x", SPREAD, STARTER, LauncherSpec("able", TARGET, interactive=True))
    shelf.put("y", strategy("friendly", launcher="ABLE"))
    with pytest.raises(UnsupportedError, match="Strategies that work here: friendly"):
        shelf.plan(strategy="spread", devices=2, interactive=True)


# -- precisions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def scoped(shelf: Shelf) -> Shelf:
    def half(owner: str, **scope: Any) -> PrecisionSpec:
        return PrecisionSpec("half", f"{owner}.module:Class", aliases=("16",), **scope)

    shelf.put("plain", half("plain"), device("unit", 2, groups=("gpu",)), SPREAD, STARTER)
    shelf.put("s", half("s", strategies=("spread",)))
    return shelf.put("both", half("both", strategies=("spread",), accelerators=("gpu",)))


def test_the_most_specific_precision_of_a_name_wins(scoped: Shelf) -> None:
    def chosen(**flags: Any) -> str:
        return scoped.plan(precision="Half", **flags).precision.distribution

    assert chosen(accelerator="cpu") == "plain"
    assert chosen(accelerator="cpu", strategy="spread") == "s"
    assert chosen(accelerator="unit", strategy="spread") == "both"
    assert chosen(accelerator="unit", devices=1) == "plain"


def test_a_scoped_precision_says_what_it_was_made_for(scoped: Shelf) -> None:
    plan = scoped.plan(precision=16)
    assert plan.precision.reason == "precision='16' was asked for; this one is made for spread with gpu"
    assert lost(plan, "precision") == {
        "half@plain": "its scope is less specific",
        "half@s": "its scope is less specific",
    }


def test_a_precision_that_exists_only_elsewhere_is_an_error(shelf: Shelf) -> None:
    shelf.put("x", PrecisionSpec("tiny", TARGET, accelerators=("unit",)))
    with pytest.raises(UnsupportedError, match="precision='tiny' exists only for unit; here the strategy is"):
        shelf.plan(precision="tiny")


def test_two_precisions_of_one_scope_are_a_clash(scoped: Shelf) -> None:
    scoped.put("t", PrecisionSpec("half", TARGET, strategies=("spread",)))
    with pytest.raises(AmbiguousPluginError, match=r"'half@s' or 'half@t'"):
        scoped.plan(precision="half", accelerator="cpu", strategy="spread")
    assert scoped.plan(precision="half@t", accelerator="cpu", strategy="spread").precision.distribution == "t"


def test_the_default_precision_may_be_scoped_too(shelf: Shelf) -> None:
    shelf.put("x", device("unit", 1), PrecisionSpec("32-true", TARGET, accelerators=("unit",)))
    plan = shelf.plan()
    assert (plan.precision.distribution, plan.precision.reason) == ("x", "the default")


@pytest.mark.parametrize(
    "asked", [32, "32", "32-TRUE", "32-true@fabric-core", "fabric_core.parts.full_precision:FullPrecision"]
)
def test_a_precision_can_be_asked_for_in_every_form(shelf: Shelf, asked: Any) -> None:
    assert "FullPrecision" in shelf.plan(precision=asked).precision.spec.target_name
    assert (
        "FullPrecision"
        in shelf.plan(plugins=(asked,) if isinstance(asked, str) else ()).precision.spec.target_name
    )


@pytest.mark.parametrize("asked", ["fp12", 12, ""])
def test_an_unknown_precision_is_an_error(shelf: Shelf, asked: Any) -> None:
    with pytest.raises(UnknownPluginError, match="No precision is named"):
        shelf.plan(precision=asked)


@pytest.mark.parametrize("asked", [True, 16.0, object(), int])
def test_a_precision_of_the_wrong_type_is_an_error(shelf: Shelf, asked: Any) -> None:
    with pytest.raises(WrongTypeError, match="precision="):
        shelf.plan(precision=asked)


def test_a_precision_given_twice_has_to_be_the_same(shelf: Shelf) -> None:
    shelf.put("x", PrecisionSpec("half", TARGET))
    with pytest.raises(ConfigurationError, match="given twice: precision='half' and plugins=\\['32-true'\\]"):
        shelf.plan(precision="half", plugins=("32-true",))
    same = json.loads('"half"')
    assert shelf.plan(precision="half", plugins=(same,)).precision.name == "half"


# -- parts by other forms than a name -------------------------------------------------------------------------------


class MyStrategy(Strategy):
    """A strategy without a spec."""


class Carrying(Strategy):
    """A strategy that carries its spec."""

    spec = StrategySpec(
        "carried", TARGET, supports=("unit",), max_devices=1, options={"preset": 1}, launcher="starter"
    )


class Derived(Carrying):
    """A strategy that derives from one that carries a spec."""


@pytest.fixture
def my_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_module")
    module.MyStrategy, module.NotAPart = MyStrategy, int  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_module", module)


@pytest.mark.usefixtures("my_module")
@pytest.mark.parametrize("asked", [MyStrategy, MyStrategy(), "my_module:MyStrategy"])
def test_a_class_an_instance_and_a_path_are_taken_as_they_are(shelf: Shelf, asked: Any) -> None:
    choice = shelf.plan(strategy=asked).strategy
    assert (choice.name, choice.distribution, choice.version) == ("MyStrategy", "passed in code", "")
    assert choice.identity == "MyStrategy (passed in code)"
    assert (choice.instance is asked) == isinstance(asked, MyStrategy)


@pytest.mark.usefixtures("my_module")
@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ("my_module:NotAPart", WrongTypeError, "int is no part of this library"),
        ("my_module:Absent", BrokenPluginError, "AttributeError"),
        ("no_such_module:Class", BrokenPluginError, "ModuleNotFoundError"),
        (":Class", ConfigurationError, "is not of the form"),
        (int, WrongTypeError, "no part of this library"),
        (5, WrongTypeError, "no part of this library"),
        (None, WrongTypeError, "no part of this library"),
        (Precision, WrongTypeError, "Precision is a precision"),
    ],
)
def test_what_is_no_strategy_is_an_error(
    shelf: Shelf, asked: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        shelf.plan(strategy=asked)


def test_a_passed_object_meets_the_same_checks_as_a_name(shelf: Shelf) -> None:
    shelf.put("x", device("unit", 4), STARTER)
    plan = shelf.plan(strategy=Carrying())
    assert (plan.strategy.name, plan.devices, plan.warnings) == ("carried", (0,), ())
    with pytest.raises(UnsupportedError, match="at most 1 device"):
        shelf.plan(strategy=Carrying, devices=2)


def test_what_derives_from_a_part_works_where_that_part_works(shelf: Shelf) -> None:
    shelf.put("x", device("unit", 4), STARTER, PrecisionSpec("half", TARGET, strategies=("carried",)))
    plan = shelf.plan(strategy=Derived, precision="half")
    assert (plan.strategy.name, plan.warnings, plan.precision.name) == ("Derived", (), "half")
    assert plan.strategy.spec.target is Derived
    assert plan.strategy.options == {}, "the options of the preset are those of the name, not of the class"


def test_names_with_a_distribution_are_found_and_wrong_ones_are_not(shelf: Shelf) -> None:
    shelf.put("acme", strategy("own"))
    assert shelf.plan(strategy="own@ACME").strategy.distribution == "acme"
    with pytest.raises(UnknownPluginError, match="No strategy is named 'own@other'"):
        shelf.plan(strategy="own@other")


# -- plugins= and loggers= ------------------------------------------------------------------------------------------


class Cluster(ClusterEnvironment):
    """A cluster environment that is never asked."""

    creates_processes_externally = False
    main_address = "127.0.0.1"
    main_port = 0

    def world_size(self) -> int:
        return 1

    def global_rank(self) -> int:
        return 0

    local_rank = node_rank = global_rank


def test_plugins_are_sorted_by_their_kind(shelf: Shelf) -> None:
    shelf.put("x", CheckpointIOSpec("tape", TARGET), PrecisionSpec("half", TARGET))
    cluster = Cluster()
    plan = shelf.plan(plugins=("half", cluster, "tape"))
    assert (plan.precision.name, plan.checkpoint_io.name) == ("half", "tape")
    assert plan.cluster_environment.instance is cluster


def test_two_plugins_of_one_kind_are_an_error(shelf: Shelf) -> None:
    with pytest.raises(ConfigurationError, match="two parts of the kind cluster environment"):
        shelf.plan(plugins=(Cluster(), "local"))


def test_a_plugin_that_nobody_knows_is_searched_in_all_kinds(shelf: Shelf) -> None:
    with pytest.raises(UnknownPluginError, match="Did you mean '32-true'"):
        shelf.plan(plugins=("32-treu",))
    with pytest.raises(UnknownPluginError, match="is the name of another kind of part: strategy"):
        shelf.plan(plugins=("single_device",))


def test_a_plugin_name_that_two_kinds_have_is_an_error(shelf: Shelf) -> None:
    shelf.put("x", CheckpointIOSpec("both", TARGET), PrecisionSpec("both", TARGET))
    with pytest.raises(ConfigurationError, match="could be a checkpoint io or a precision"):
        shelf.plan(plugins=("both",))


@pytest.mark.parametrize("wrong", [MyStrategy(), int, 3, None])
def test_a_plugin_of_a_kind_that_has_its_own_flag_is_an_error(shelf: Shelf, wrong: Any) -> None:
    with pytest.raises(WrongTypeError, match="plugins= takes parts of the kinds"):
        shelf.plan(plugins=(wrong,))


def test_a_logger_is_a_name_or_anything_that_logs(shelf: Shelf) -> None:
    class Notes:
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None: ...

    mine = Notes()
    shelf.put("x", LoggerSpec("log", TARGET))
    plan = shelf.plan(loggers=("log", mine))
    assert [(logger.name, logger.instance) for logger in plan.loggers] == [("log", None), ("Notes", mine)]
    with pytest.raises(WrongTypeError, match="a logger needs a method log_metrics"):
        shelf.plan(loggers=(3,))


def test_options_of_the_user_lie_over_those_of_the_preset(shelf: Shelf) -> None:
    shelf.put("x", strategy("preset", options={"stage": 3, "overlap": True}))
    plan = shelf.plan(strategy="preset", options={"strategy": {"stage": 2, "extra": None}})
    assert plan.strategy.options == {"stage": 2, "overlap": True, "extra": None}
    with pytest.raises(OptionsError, match="is made already"):
        shelf.plan(strategy=MyStrategy(), options={"strategy": {"stage": 2}})


# -- usable? ---------------------------------------------------------------------------------------------------------


def test_a_part_for_another_version_of_the_contract_is_refused(shelf: Shelf) -> None:
    shelf.put("acme", strategy("future", api=2))
    told = r"strategy future \(from acme 1\) .*version 2 of its contract; .* speaks version 1\."
    with pytest.raises(ContractVersionError, match=told) as caught:
        shelf.plan(strategy="future")
    assert "pip install --upgrade fabric-core" in str(caught.value)


@pytest.mark.parametrize(
    ("requirement", "met"),
    [
        ("fabric-core", True),
        ("Fabric_Core>=0", True),
        ("fabric-core>=999", False),
        ("nobody-has-this", False),
        ("nobody-has-this; python_version < '3'", True),
        ("fabric-core>=0; python_version >= '3'", True),
    ],
)
def test_requirements_are_looked_up_in_the_metadata(shelf: Shelf, requirement: str, met: bool) -> None:
    shelf.put("x", strategy("needy", requires=(requirement,)))
    if met:
        assert shelf.plan(strategy="needy").strategy.name == "needy"
    else:
        with pytest.raises(MissingRequirementError, match="Install it: pip install"):
            shelf.plan(strategy="needy")


def test_a_requirement_that_cannot_be_read_is_a_fault_of_its_plugin_only(shelf: Shelf) -> None:
    shelf.put("x", strategy("odd", requires=("=> 1",)), device("unit", 1, requires=("!!",)))
    with pytest.raises(BrokenPluginError, match="the requirement '=> 1' of a plugin cannot be read"):
        shelf.plan(strategy="odd", accelerator="cpu")
    with pytest.raises(BrokenPluginError, match="would fall back"):
        shelf.plan()


def test_a_plugin_may_veto_a_plan(shelf: Shelf) -> None:
    asked: list[Plan] = []

    def check(plan: Plan) -> str | None:
        asked.append(plan)
        return "The moon is in the wrong phase." if plan.num_nodes == 1 else None

    shelf.put("moon", check=check)
    with pytest.raises(UnsupportedError, match=r"cannot work: The moon is in the wrong phase. \(says moon\)"):
        shelf.plan()
    assert asked[0].accelerator.name == "cpu"
    shelf.put("y", SPREAD, STARTER)
    assert shelf.plan(num_nodes=2).num_nodes == 2


def test_a_check_that_fails_is_a_warning_and_stops_nobody(shelf: Shelf) -> None:
    shelf.put("sick", check=lambda plan: 1 / 0)
    plan = shelf.plan()
    assert plan.warnings == ("sick could not check the plan: ZeroDivisionError: division by zero",)


# -- cluster environments --------------------------------------------------------------------------------------------


def cluster(
    name: str, variable: str, processes: int | None = None, nodes: int | None = None, **more: Any
) -> Any:
    def detect(environ: Mapping[str, str]) -> Detection | None:
        return Detection(processes, nodes, f"{variable} is set") if variable in environ else None

    return ClusterEnvironmentSpec(name, TARGET, detect=detect, **more)


def test_the_detected_environment_of_the_highest_priority_wins(shelf: Shelf) -> None:
    shelf.put("x", cluster("low", "A", priority=1), cluster("high", "B", priority=2))
    plan = shelf.plan({"A": "", "B": ""})
    assert (plan.cluster_environment.name, plan.cluster_environment.reason) == ("high", "detected: B is set")
    assert lost(plan, "cluster environment") == {"low": "detected too (A is set), with a lower priority"}
    assert shelf.plan({"A": ""}).cluster_environment.name == "low"
    assert shelf.plan().cluster_environment.name == "local"


def test_two_environments_of_one_priority_are_an_error_where_both_are(shelf: Shelf) -> None:
    shelf.put("x", cluster("one", "A"), cluster("two", "B"))
    with pytest.raises(AmbiguousPluginError, match="cannot choose between one@x, two@x"):
        shelf.plan({"A": "", "B": ""})
    assert shelf.plan({"A": "", "B": ""}, plugins=("two",)).cluster_environment.name == "two"


def test_the_plan_follows_what_the_environment_has_started(shelf: Shelf) -> None:
    shelf.put("x", cluster("big", "A", 4, 2), device("unit", 8), SPREAD, STARTER)
    plan = shelf.plan({"A": ""})
    assert (plan.devices, plan.num_nodes, plan.world_size) == ((0, 1, 2, 3), 2, 8)
    assert (plan.launcher, plan.strategy.name) == (None, "spread")
    assert shelf.plan({"A": ""}, devices=4, num_nodes=2).world_size == 8


def test_flags_that_contradict_the_environment_are_an_error(shelf: Shelf) -> None:
    shelf.put("x", cluster("big", "A", 4, 2), device("unit", 8), device("pair", 2), SPREAD, STARTER)
    with pytest.raises(
        DevicesError, match=r"means 3 process\(es\) on this node, but .* has started 4. Start 3, or leave"
    ):
        shelf.plan({"A": ""}, accelerator="unit", devices=3)
    with pytest.raises(ConfigurationError, match="num_nodes=3 was asked for, but .* has 2 node"):
        shelf.plan({"A": ""}, accelerator="unit", num_nodes=3)
    with pytest.raises(DevicesError, match="choose an accelerator with devices for all"):
        shelf.plan({"A": ""}, accelerator="pair")


def test_one_started_process_may_drive_several_devices(shelf: Shelf) -> None:
    shelf.put("x", cluster("small", "A", 1, 1), device("unit", 4), strategy("whole", processes="single"))
    assert shelf.plan({"A": ""}, strategy="whole").devices == (0, 1, 2, 3)


@pytest.mark.parametrize("answer", [True, "yes", 4])
def test_a_detection_that_fails_or_answers_garbage_is_a_warning(shelf: Shelf, answer: Any) -> None:
    shelf.put("x", ClusterEnvironmentSpec("odd", TARGET, detect=lambda environ: answer))
    shelf.put("y", ClusterEnvironmentSpec("sick", TARGET, detect=lambda environ: environ["NOT_THERE"]))
    plan = shelf.plan()
    assert plan.cluster_environment.name == "local"
    assert len(plan.warnings) == 2
    assert "The detection of cluster environment 'sick' failed: KeyError: 'NOT_THERE'" in plan.warnings[1]
    with pytest.raises(BrokenPluginError, match="failed: KeyError"):
        shelf.plan(plugins=("sick",))


def test_a_job_that_nobody_recognises_is_a_warning_that_names_the_ways_out(shelf: Shelf) -> None:
    by_hand = {"RANK": "0", "WORLD_SIZE": "2"}
    (warning,) = shelf.plan(by_hand).warnings
    assert warning.startswith("WORLD_SIZE=2 is set, but no cluster environment recognises the job")
    assert all(way in warning for way in ("'fabric run'", "torchrun", "plugins="))
    for alone in ("1", "", "two", "-2"):
        assert shelf.plan({"WORLD_SIZE": alone}).warnings == ()
    shelf.put("x", cluster("named", "A", 1, 1))
    assert shelf.plan(by_hand | {"A": ""}).warnings == ()
    assert shelf.plan(by_hand, plugins=("named",)).warnings == ()


def test_nobody_else_can_stand_in_for_the_parts_that_the_core_needs(shelf: Shelf) -> None:
    shelf.put(
        "thief",
        ClusterEnvironmentSpec("local", TARGET),
        CheckpointIOSpec("torch_file", TARGET),
        AcceleratorSpec("cpu", TARGET, probe=has(1), priority=-200),
    )
    plan = shelf.plan(devices=None)
    assert {part.distribution for part in plan} == {"fabric-core"}


# -- the plan itself -------------------------------------------------------------------------------------------------


def test_a_plan_becomes_json(shelf: Shelf) -> None:
    shelf.put("x", device("unit", 2), SPREAD, STARTER)
    options = {"strategy": {"hook": print, "policy": {Strategy, 1}, "deep": {("a", 1): [object()]}}}
    plain = json.loads(json.dumps(shelf.plan(options=options).to_dict()))
    assert plain["world_size"] == 2
    assert [part["kind"] for part in plain["parts"]] == [
        "accelerator",
        "strategy",
        "precision",
        "cluster environment",
        "launcher",
        "checkpoint io",
    ]
    chosen = plain["parts"][1]
    assert (chosen["name"], chosen["target"], chosen["distribution"]) == ("spread", TARGET, "x")
    assert set(plain["parts"][0]) >= {"reason", "lost", "version", "options"}
    assert chosen["options"]["hook"] == "<builtins.print>"


def test_a_fingerprint_holds_no_address_and_every_difference_that_matters(shelf: Shelf) -> None:
    class Knob:
        pass

    shelf.put("x", device("unit", 4), SPREAD, STARTER)

    def fingerprint(**flags: Any) -> dict[str, str]:
        flags = {"options": {"strategy": {"knob": Knob(), "call": lambda: 0, "names": {"b", "a"}}}, **flags}
        return shelf.plan(**flags).fingerprint()

    first = fingerprint()
    assert first == fingerprint(), "two objects of one kind are the same wherever they lie"
    assert "0x" not in json.dumps(first)
    assert "Knob" in json.dumps(first)
    assert fingerprint(devices=[0, 1]) == fingerprint(devices=[2, 3]), (
        "nodes may number their devices differently"
    )
    for other in (
        {"devices": 3},
        {"num_nodes": 2},
        {"options": {"strategy": {"knob": 1}}},
        {"accelerator": "cpu"},
    ):
        assert fingerprint(devices=2) != fingerprint(**{"devices": 2, **other})


def test_resolving_leaves_the_registry_as_it_was(shelf: Shelf) -> None:
    shelf.put(
        "x", ClusterEnvironmentSpec("sick", TARGET, detect=lambda environ: 1 / 0), check=lambda plan: 1 / 0
    )
    before = (list(shelf.offers()), list(shelf.problems))
    assert shelf.plan().to_dict() == shelf.plan().to_dict()
    assert (list(shelf.offers()), list(shelf.problems)) == before


def test_resolving_imports_no_torch_and_no_part(python: Any, tmp_path: Path) -> None:
    ended = python(
        "-c",
        "import sys\n"
        "from fabric_core import Registry, Request\n"
        "from fabric_core.resolve import resolve\n"
        "plan = resolve(Request(strategy='ddp', devices=2, accelerator='cpu', precision='bf16'), Registry())\n"
        "assert plan.world_size == 2\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'fabric_backends.strategies.ddp' not in sys.modules",
    )
    assert ended.returncode == 0, ended.stderr
