"""What the command line tells of parts: their states, all about one, pairs, plans, and what is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fabric_core import AcceleratorSpec, Inventory, PrecisionSpec, StrategySpec
from fabric_core.cli import OWN
from fabric_core.hookspecs import OWN_COMMANDS
from fabric_core.resolve.pairs import pairs

if TYPE_CHECKING:
    from conftest import Run, Shelf, Site

ZETA = """
    from fabric_core import CommandSpec, LoggerSpec, StrategySpec, hookimpl

    @hookimpl
    def fabric_strategies():
        yield StrategySpec("odd", "zeta.part:Class", requires=("no requirement at all",), description="odd one")
        yield StrategySpec("plain", "zeta.part:Class", options={"stage": 2}, options_type="zeta.light:Options")
        yield StrategySpec("lost", "zeta.part:Class", options_type="zeta.light:Missing")

    @hookimpl
    def fabric_cli_commands():
        yield CommandSpec("run", "zeta.part:command", help="Wants to be ours.")
        yield CommandSpec("zeta", "zeta.part:command", help="Is its own.")
"""

LIGHT = '''
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Options:
        """Options.

        Attributes:
            stage: How much is divided.
            folder: Where to.
        """

        folder: str
        stage: int = 1
'''


@pytest.fixture
def zeta(site: Site) -> dict[str, str]:
    """An environment in which a plugin with several states is installed."""
    metadata = "Metadata-Version: 2.1\nName: zeta\nVersion: 2.5\nRequires-Dist: nobody-has-this>=3\n"
    metadata += 'Requires-Dist: nor-this; extra == "more"\nRequires-Dist: fabric-core>=0.1\n\n'
    site.install("zeta", ZETA, version="2.5", metadata=metadata, files={"light.py": LIGHT})
    return {"PYTHONPATH": str(site.folder)}


def answer(fabric: Run, *args: str, code: int = 0, **more: Any) -> Any:
    """What a command says with ``--json``."""
    ended = fabric(*args, "--json", **more)
    assert (ended.returncode, ended.stderr) == (code, "")
    return json.loads(ended.stdout)


def test_no_distribution_can_take_the_name_of_a_command_of_ours() -> None:
    assert tuple(OWN) == OWN_COMMANDS


# -- list and info ---------------------------------------------------------------------------------------------------


def test_the_list_has_a_state_and_a_version_for_commands_and_for_unreadable_requirements(
    fabric: Run, zeta: dict[str, str]
) -> None:
    found = {
        (part["kind"], part["name"]): part
        for part in answer(fabric, "plugins", "list", env=zeta)["parts"]
        if part["distribution"] == "zeta"
    }
    assert found["command", "run"]["state"] == "clash: it is a command of the core"
    assert (found["command", "zeta"]["state"], found["command", "zeta"]["version"]) == ("ok", "2.5")
    assert found["strategy", "odd"]["state"].startswith("broken: the requirement 'no requirement at all'")
    assert found["strategy", "plain"]["state"] == "ok"


def test_the_table_has_a_row_for_every_part_and_for_what_is_blocked_or_broken(
    fabric: Run, zeta: dict[str, str], site: Site
) -> None:
    site.install("ruin", "raise RuntimeError('built for another version')", version="7.0")
    site.install("quiet", "", version="3.0")
    told = fabric("plugins", "list", env=zeta | {"FABRIC_PLUGINS_DENY": "quiet"}).stdout
    assert re.search(r"^STRATEGY +FROM +VERSION +STATE *$", told, re.MULTILINE)
    assert re.search(r"^plain +zeta +2\.5 +ok *$", told, re.MULTILINE)
    assert re.search(r"^zeta +zeta +2\.5 +ok *$", told, re.MULTILINE), "a command"
    assert re.search(r"^DISTRIBUTION +VERSION +STATE +WHY *$", told, re.MULTILINE)
    assert re.search(r"^ruin +7\.0 +broken +RuntimeError: built for another version *$", told, re.MULTILINE)
    assert re.search(r"^quiet +3\.0 +blocked +by FABRIC_PLUGINS_\* *$", told, re.MULTILINE)


def test_a_wide_terminal_has_room_for_descriptions(fabric: Run, zeta: dict[str, str]) -> None:
    arguments = ("plugins", "list", "--kind=strategy")
    assert "odd one" not in fabric(*arguments, env=zeta).stdout
    assert "odd one" in fabric(*arguments, env=zeta | {"COLUMNS": "160"}).stdout


def test_info_lists_the_options_that_a_part_declares(fabric: Run, zeta: dict[str, str]) -> None:
    (found,) = answer(fabric, "plugins", "info", "plain", env=zeta)
    assert found["takes"] == [
        {"name": "folder", "may_be": "a text", "default": "has to be given", "help": "Where to."},
        {"name": "stage", "may_be": "a whole number", "default": "2", "help": "How much is divided."},
    ]
    told = fabric("plugins", "info", "plain", env=zeta).stdout
    assert told.startswith("strategy plain\n  distribution")
    assert re.search(r"^stage +How much is divided\. \[a whole number; default: 2\] *$", told, re.MULTILINE)
    assert re.search(r"^folder +Where to\. \[a text; has to be given\] *$", told, re.MULTILINE)


def test_info_on_a_part_whose_options_cannot_be_read_says_so(fabric: Run, zeta: dict[str, str]) -> None:
    (found,) = answer(fabric, "plugins", "info", "lost", env=zeta)
    assert found["takes"] is None
    assert found["state"].startswith("broken: the options_type of the strategy 'lost' cannot be loaded")


# -- matrix ----------------------------------------------------------------------------------------------------------


def never() -> Inventory:
    raise AssertionError("hardware was looked at")


def accelerator(name: str, **more: Any) -> AcceleratorSpec:
    """An accelerator that must not be probed."""
    return AcceleratorSpec(name, "package.module:Class", probe=never, **more)


def strategy(name: str, **more: Any) -> StrategySpec:
    return StrategySpec(name, "package.module:Class", **more)


@pytest.fixture
def crowd(shelf: Shelf) -> Shelf:
    """Distributions that say things of each other."""

    def check(plan: Any) -> str | None:
        if plan.strategy.name == "gamma" and plan.accelerator.name == "two":
            return "gamma melts two."
        if plan.strategy.name == "beta" and len(plan.devices) == 1:
            return "beta needs two devices."
        return None

    shelf.put(
        "metal", accelerator("one", groups=("pair",)), accelerator("two", strategies={"many": "Delta@soft"})
    )
    shelf.put(
        "soft",
        strategy("alpha", supports=("PAIR",), rejects=("two",)),
        strategy("beta", supports=("*",)),
        strategy("gamma", supports=("two",)),
        strategy("delta", precisions=("low",)),
    )
    shelf.put("low", PrecisionSpec("low", "package.module:Class", strategies=("delta",)))
    shelf.put("watch", check=check)
    return shelf


def standings(
    shelf: Shelf, precision: str | None = None
) -> dict[tuple[str, str], tuple[str, tuple[str, ...]]]:
    return {
        (pair.strategy.spec.name, pair.accelerator.spec.name): (pair.standing, pair.by)
        for pair in pairs(shelf, precision)
        if pair.strategy.distribution != "fabric-core" and pair.accelerator.distribution != "fabric-core"
    }


def test_who_says_of_each_pair_that_it_works_or_does_not(crowd: Shelf) -> None:
    assert standings(crowd) == {
        ("alpha", "one"): ("supported", ("soft",)),
        ("alpha", "two"): ("rejected", ("soft",)),
        ("beta", "one"): ("supported", ("soft",)),
        ("beta", "two"): ("supported", ("soft",)),
        ("gamma", "one"): ("unknown", ()),
        ("gamma", "two"): ("rejected", ("watch",)),
        ("delta", "one"): ("rejected", ("soft",)),  # it does not take 32-true
        ("delta", "two"): ("rejected", ("soft",)),
    }
    reasons = {(p.strategy.spec.name, p.accelerator.spec.name): p.why for p in pairs(crowd)}
    assert reasons["gamma", "two"] == "gamma melts two."
    assert reasons["alpha", "two"] == "the strategy rejects two"
    assert reasons["beta", "one"] == "the strategy supports every accelerator"
    assert "works with low" in reasons["delta", "one"]


def test_a_pair_may_work_with_one_precision_only(crowd: Shelf) -> None:
    found = standings(crowd, "low")
    assert found["delta", "one"] == ("unknown", ())
    assert found["delta", "two"] == ("supported", ("metal",)), "the accelerator asks for the strategy"
    assert found["beta", "one"] == ("rejected", ("soft",))


def test_the_matrix_is_told_by_strategy_and_as_json(fabric: Run) -> None:
    told = fabric("plugins", "matrix").stdout
    assert re.search(r"^STRATEGY +IS +SAYS +WITH *$", told, re.MULTILINE)
    assert re.search(r"^single_device +supported +fabric-core +cpu", told, re.MULTILINE)
    assert max(map(len, told.splitlines())) <= 80
    found = answer(fabric, "plugins", "matrix")
    single = {pair["accelerator"]: pair for pair in found if pair["strategy"] == "single_device@fabric-core"}
    assert single["cpu@fabric-core"] == {
        "strategy": "single_device@fabric-core",
        "accelerator": "cpu@fabric-core",
        "standing": "supported",
        "by": ["fabric-core"],
        "why": "the strategy supports every accelerator",
    }
    assert {pair["standing"] for pair in found} == {"supported", "rejected", "unknown"}


def test_the_matrix_of_a_precision_that_nobody_has_is_an_error(fabric: Run) -> None:
    ended = fabric("plugins", "matrix", "--precision=32-tru")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "No precision is named '32-tru'. Did you mean '32-true'?" in ended.stderr


# -- explain ---------------------------------------------------------------------------------------------------------


def test_the_table_of_a_plan_tells_options_with_who_states_them(
    fabric: Run, site: Site, tmp_path: Path
) -> None:
    hooks = """
        from fabric_core import StrategySpec, hookimpl

        @hookimpl
        def fabric_strategies():
            yield StrategySpec("eager", "eager.part:Class", options={"stage": 2}, volunteers_for=("one",), priority=9)
            yield StrategySpec("lazy", "eager.part:Class", volunteers_for=("one",), priority=1)
            yield StrategySpec("idle", "eager.part:Class", volunteers_for=("one",), priority=1)
    """
    site.install("eager", hooks, version="4.0")
    arguments = ("explain", "--accelerator=cpu", "--strategy.level=3")
    ended = fabric(*arguments, env={"PYTHONPATH": str(site.folder), "FABRIC_PLUGINS_ALLOW": "eager"})
    assert (ended.returncode, ended.stderr) == (0, "")
    strategy_lines = ended.stdout[
        ended.stdout.index("\nstrategy ") : ended.stdout.index("\nprecision ")
    ].split("\n")
    assert re.match(r"strategy +eager +auto: volunteers for 1 device\(s\) on 1 node\(s\)", strategy_lines[1])
    rest = " ".join(line.strip() for line in strategy_lines[2:])
    assert rest.startswith("from eager 4.0 stage = 2, by ")
    assert "stage = 2, by the preset level = 3, by the command line" in rest
    assert "not lazy, idle, single_device: volunteers with a lower priority" in rest


# -- doctor ----------------------------------------------------------------------------------------------------------


def test_the_doctor_finds_dependencies_that_are_not_met_but_not_those_of_extras(
    fabric: Run, zeta: dict[str, str]
) -> None:
    found = answer(fabric, "doctor", code=1, env=zeta)
    told = {
        problem["message"]: problem["broken"]
        for problem in found["problems"]
        if problem["distribution"] == "zeta"
    }
    assert told["it needs nobody-has-this>=3, which is not installed. Install it: pip install zeta"] is True
    assert not [message for message in told if "nor-this" in message]
    assert any(message.startswith("strategy 'odd': broken: the requirement") for message in told)


def test_the_doctor_tells_versions_of_contracts_and_variables_of_ours(fabric: Run) -> None:
    found = answer(fabric, "doctor", env={"FABRIC_PLUGINS_ALLOW": "fabric-core", "FABRIC_SEED": "5"})
    assert found["contracts"]["strategy"] == [1, 1]
    assert found["variables"] == {"FABRIC_PLUGINS_ALLOW": "fabric-core", "FABRIC_SEED": "5"}
    assert set(found["blocked"][0]) == {"distribution", "version"}


# -- what is imported ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("plugins", "list"),
        ("plugins", "info", "32-true"),
        ("plugins", "matrix"),
        ("plugins", "check", "--installed", "zeta"),
        ("explain", "--accelerator=cpu"),
        ("doctor",),
    ],
    ids=" ".join,
)
def test_what_looks_at_no_hardware_imports_no_torch(
    fabric: Run, site: Site, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    metadata = "Metadata-Version: 2.1\nName: zeta\nVersion: 1.0\nRequires-Dist: fabric-core\n\n"
    site.install("zeta", "", metadata=metadata)
    (site.folder / "torch.py").write_text("import os\nos._exit(77)")
    variables = {"PYTHONPATH": str(site.folder)}
    if arguments == ("doctor",):  # it asks every probe; that of the CPU has nothing to ask of PyTorch
        variables["FABRIC_PLUGINS_ALLOW"] = "zeta"
    assert fabric(*arguments, env=variables).returncode == 0
