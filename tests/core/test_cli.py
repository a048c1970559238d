"""The command line but for ``run``: what it lists and explains, its exit codes, and how soon it answers."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fabric_core
from fabric_core.specs import KINDS

resource = pytest.importorskip("resource", reason="tests the command on POSIX")

if TYPE_CHECKING:
    from conftest import Run, Site

ACME = """
    from fabric_core import (
        AcceleratorSpec, ClusterEnvironmentSpec, CommandSpec, Inventory, PrecisionSpec, StrategySpec, hookimpl
    )

    def probe():
        raise OSError("the driver does not answer")

    def detect(environ):
        return environ["ACME_JOB_THAT_IS_NOT_THERE"]

    @hookimpl
    def fabric_accelerators():
        yield AcceleratorSpec("dead", "acme.part:Class", probe=probe, priority=1000)

    @hookimpl
    def fabric_strategies():
        yield StrategySpec("needy", "acme.part:Class", requires=("nobody-has-this>=2",), description="[bold]x[/bold]")
        yield StrategySpec("future", "acme.part:Class", api=2, aliases=("tomorrow",))
        yield StrategySpec("ddp", "acme.part:Class")

    @hookimpl
    def fabric_precisions():
        yield PrecisionSpec("bf16-mixed", "acme.part:Class", strategies=("needy",), options={"dtype": "bfloat16"})

    @hookimpl
    def fabric_cluster_environments():
        yield ClusterEnvironmentSpec("acme-cloud", "acme.part:Class", detect=detect)

    @hookimpl
    def fabric_cli_commands():
        yield CommandSpec("hello", "acme.commands:hello", help="Greet somebody.")
        yield CommandSpec("broken", "acme.no_such_module:command", help="Cannot work.")
        yield CommandSpec("function", "acme.commands:function", help="Is no command.")
        yield CommandSpec("run", "acme.commands:hello", help="Wants to be ours.")
"""

COMMANDS = """
    import click

    @click.command()
    @click.argument("name")
    def hello(name):
        click.echo(f"hello {name}")

    def function():
        pass
"""


@pytest.fixture
def acme(site: Site) -> dict[str, str]:
    """An environment in which a plugin is installed of which much is wrong."""
    site.install("acme", ACME, version="3.1", files={"commands.py": COMMANDS})
    return {"PYTHONPATH": str(site.folder)}


def answer(fabric: Run, *args: str, code: int = 0, **more: Any) -> Any:
    """What a command says with ``--json``."""
    ended = fabric(*args, "--json", **more)
    assert (ended.returncode, ended.stderr) == (code, "")
    return json.loads(ended.stdout)


# -- the command itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_our_commands(fabric: Run, option: str) -> None:
    ended = fabric(option)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.findall(r"^  (\w+)  ", ended.stdout, re.MULTILINE) == [
        "run",
        "explain",
        "plugins",
        "consolidate",
        "shard",
        "doctor",
    ]


@pytest.mark.parametrize(
    "command", [("run",), ("explain",), ("plugins",), ("plugins", "list"), ("plugins", "info"), ("doctor",)]
)
def test_every_command_has_help_within_eighty_columns(fabric: Run, command: tuple[str, ...]) -> None:
    ended = fabric(*command, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"Usage: fabric {' '.join(command)}")
    assert max(map(len, ended.stdout.splitlines())) <= 80


def test_the_version_is_that_of_the_core(fabric: Run) -> None:
    assert fabric("--version").stdout == f"fabric {fabric_core.__version__}\n"


def test_the_module_is_the_command(fabric: Run, python: Run) -> None:
    for args in (["--help"], ["explain", "--json"], ["nonsense"]):
        one, other = fabric(*args), python("-m", "fabric_core", *args)
        assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)


def test_an_unknown_command_is_answered_with_the_nearest(fabric: Run) -> None:
    ended = fabric("explian")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "There is no command 'explian'. Did you mean 'explain'?" in ended.stderr


def test_a_traceback_is_shown_only_when_it_is_asked_for(fabric: Run) -> None:
    ended = fabric("explain", "--strategy=dpp")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    debugged = fabric("explain", "--strategy=dpp", env={"FABRIC_DEBUG": "1"})
    assert debugged.returncode == 1
    assert debugged.stderr.startswith("Traceback")


def test_a_reader_that_leaves_early_is_no_error_worth_a_traceback(clean_environ: dict[str, str]) -> None:
    command = Path(sys.executable).with_name("fabric")
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = os.posix_spawn(
        command,
        [str(command), "plugins", "list", "--json"],
        clean_environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, write_end, 1), (os.POSIX_SPAWN_DUP2, write_end, 2)],
    )
    os.close(write_end)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) in (1, 120)


@pytest.mark.parametrize(
    "args",
    [["--help"], ["--version"], ["plugins", "list"], ["explain", "--accelerator=cpu"], ["run", "--help"]],
)
def test_no_command_imports_torch(fabric: Run, tmp_path: Path, args: list[str]) -> None:
    (tmp_path / "torch.py").write_text("import os\nos._exit(77)")
    assert fabric(*args, env={"PYTHONPATH": str(tmp_path)}).returncode == 0


def test_help_takes_an_eighth_of_a_second_of_cpu_time(fabric: Run, least: Any) -> None:
    def measure() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        fabric("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert least(measure, 0.125) < 0.125


# -- plugins list ----------------------------------------------------------------------------------------------------


def test_the_list_holds_every_kind_and_every_installed_part(fabric: Run) -> None:
    found = answer(fabric, "plugins", "list")
    assert {part["kind"] for part in found["parts"]} == set(KINDS)
    by_name = {(part["kind"], part["name"], part["distribution"]): part for part in found["parts"]}
    assert by_name["precision", "32-true", "fabric-core"] == {
        "kind": "precision",
        "name": "32-true",
        "aliases": ["32"],
        "distribution": "fabric-core",
        "version": fabric_core.__version__,
        "state": "ok",
        "description": "float32 everywhere",
    }
    assert (found["broken"], found["blocked"]) == ([], [])


def test_the_list_tells_what_is_in_the_way_of_a_part(fabric: Run, acme: dict[str, str]) -> None:
    found = answer(fabric, "plugins", "list", env=acme)
    states = {(p["name"], p["distribution"]): p["state"] for p in found["parts"] if p["kind"] != "command"}
    assert states["needy", "acme"] == "needs nobody-has-this>=2"
    assert states["future", "acme"] == "wrong contract version: 2, and this core speaks version 1"
    assert states["ddp", "acme"] == "clash: fabric-backends offers it too"
    assert states["ddp", "fabric-backends"] == "clash: acme offers it too"
    assert states["bf16-mixed", "acme"] == "ok", "another scope is no clash"
    assert states["dead", "acme"] == "ok", "only the doctor looks at hardware"


def test_the_list_shows_what_is_broken_and_what_is_blocked(
    fabric: Run, acme: dict[str, str], site: Site
) -> None:
    site.install("ruin", "raise RuntimeError('built for another version')")
    found = answer(fabric, "plugins", "list", env=acme | {"FABRIC_PLUGINS_DENY": "acme"})
    assert found["broken"] == [
        {
            "distribution": "ruin",
            "version": "1.0",
            "state": "broken",
            "message": "RuntimeError: built for another version",
        }
    ]
    assert found["blocked"] == [
        {"distribution": "acme", "version": "3.1", "state": "blocked", "message": "by FABRIC_PLUGINS_*"}
    ]
    assert not [part for part in found["parts"] if part["distribution"] == "acme"]


@pytest.mark.parametrize("kind", ["cluster environment", "cluster-environment", "Cluster_Environment"])
def test_the_list_can_be_of_one_kind(fabric: Run, kind: str) -> None:
    assert {part["kind"] for part in answer(fabric, "plugins", "list", "--kind", kind)["parts"]} == {
        "cluster environment"
    }


def test_an_unknown_kind_is_an_error(fabric: Run) -> None:
    ended = fabric("plugins", "list", "--kind", "strategie")
    assert ended.returncode == 2
    assert ended.stderr.startswith(
        "fabric: There is no kind 'strategie'. Did you mean 'strategy'? Kinds: acc"
    )


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("plugins", "list"), 0),
        (("plugins", "info", "needy"), 0),
        (("explain", "--accelerator=cpu"), 0),
        (("doctor",), 1),
    ],
)
def test_what_is_shown_fits_into_eighty_columns_and_is_plain_in_a_pipe(
    fabric: Run, acme: dict[str, str], site: Site, args: tuple[str, ...], code: int
) -> None:
    site.install("a-distribution-with-quite-a-long-name-of-its-own", "raise RuntimeError('x' * 200)")
    ended = fabric(*args, env=acme | {"FORCE_COLOR": "", "LANG": "C", "PYTHONIOENCODING": "ascii"})
    assert (ended.returncode, ended.stderr) == (code, "")
    assert "\x1b" not in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 80
    if args[1:] == ("info", "needy"):
        assert "[bold]x[/bold]" in ended.stdout


# -- plugins info ----------------------------------------------------------------------------------------------------


def test_info_tells_every_field_of_a_part(fabric: Run, acme: dict[str, str]) -> None:
    (found,) = answer(fabric, "plugins", "info", "Tomorrow", env=acme)
    assert (found["name"], found["aliases"], found["api"], found["version"]) == (
        "future",
        ["tomorrow"],
        2,
        "3.1",
    )
    assert found["target"] == "acme.part:Class"


def test_info_tells_of_every_part_of_a_name_and_of_one_distribution(
    fabric: Run, acme: dict[str, str]
) -> None:
    found = answer(fabric, "plugins", "info", "bf16-mixed", env=acme)
    assert {"acme", "fabric-backends"} <= {part["distribution"] for part in found}
    (one,) = answer(fabric, "plugins", "info", "bf16-mixed@acme", env=acme)
    assert (one["strategies"], one["options"]) == (["needy"], {"dtype": "bfloat16"})


def test_info_can_be_of_one_kind_and_knows_near_names(fabric: Run) -> None:
    assert len(answer(fabric, "plugins", "info", "cpu", "--kind=accelerator")) == 1
    ended = fabric("plugins", "info", "cpu", "--kind=strategy")
    assert ended.returncode == 2
    assert "No strategy is named 'cpu'" in ended.stderr
    assert "Did you mean 'single_device'?" in fabric("plugins", "info", "singl_device").stderr


# -- explain ---------------------------------------------------------------------------------------------------------


def test_explain_tells_why_each_part_was_chosen_and_what_lost(fabric: Run) -> None:
    plan = answer(
        fabric, "explain", "--strategy", "ddp", "--devices=2", "--precision", "bf16", "--accelerator=cpu"
    )
    assert plan["world_size"] == 2
    chosen = {part["kind"]: part for part in plan["parts"]}
    assert chosen["strategy"]["reason"] == "strategy='ddp' was asked for"
    assert chosen["precision"]["name"] == "bf16-mixed"
    told = fabric("explain").stdout
    assert re.search(r"^accelerator +\w+ +auto: the best that is available", told, re.MULTILINE)
    assert re.search(r"^ +from fabric-core \d", told, re.MULTILINE)
    assert re.search(r"^ +not .*: ", told, re.MULTILINE)
    assert re.search(r"^processes +\d+ +\d+ per node \* 1 node\(s\)", told, re.MULTILINE)


def test_explain_takes_both_spellings_and_shows_warnings(fabric: Run, acme: dict[str, str]) -> None:
    flags = ("--num_nodes=2", "--accelerator=cpu", "--strategy=ddp@fabric-backends")
    assert answer(fabric, "explain", *flags)["world_size"] == 2
    ended = fabric("explain", *flags, env=acme)
    assert "warning: The detection of cluster environment 'acme-cloud' failed: KeyError" in ended.stdout
    assert "  not acme-cloud: The detection" in ended.stdout


def test_explain_says_what_cannot_be(fabric: Run, acme: dict[str, str]) -> None:
    for flags, code, message in [
        (("--devices=two",), 2, "devices='two' is not understood"),
        (("--strategy=ddp",), 2, "Several distributions offer a strategy named 'ddp'"),
        (("--strategy=needy",), 1, "Install it: pip install 'nobody-has-this>=2'"),
        (("--accelerator=dead",), 1, "OSError: the driver does not answer"),
    ]:
        flags = flags if "--accelerator=dead" in flags else (*flags, "--accelerator=cpu")
        ended = fabric("explain", *flags, env=acme)
        assert ended.returncode == code
        assert message in ended.stderr


def test_explain_does_not_fall_back_in_silence(fabric: Run, acme: dict[str, str]) -> None:
    ended = fabric("explain", env=acme)
    assert ended.returncode == 1
    assert "accelerator='auto' would fall back to" in ended.stderr
    assert fabric("explain", env=acme | {"FABRIC_AUTO_FALLBACK": "1"}).returncode == 0


# -- doctor ----------------------------------------------------------------------------------------------------------


def test_the_doctor_is_content_with_a_sound_installation(fabric: Run) -> None:
    found = answer(fabric, "doctor")
    assert {"python", "platform", "torch", "fabric-core", "fabric-backends"} <= set(found["versions"])
    assert "cpu" in [device["name"] for device in found["devices"] if device["available"]]
    assert [problem for problem in found["problems"] if problem["broken"]] == []
    core_alone = {"FABRIC_PLUGINS_ALLOW": "fabric-core"}
    assert answer(fabric, "doctor", env=core_alone)["problems"] == []
    assert "No problem was found." in fabric("doctor", env=core_alone).stdout


def test_the_doctor_says_what_is_broken_and_why(fabric: Run, acme: dict[str, str], site: Site) -> None:
    site.install("ruin", "x = 1\nraise RuntimeError('built for another version')")
    site.install("typo", "from fabric_core import hookimpl\n@hookimpl\ndef fabric_logers():\n    return []\n")
    found = answer(fabric, "doctor", code=1, env=acme)
    told = {problem["message"]: problem for problem in found["problems"]}
    ruin = told["RuntimeError: built for another version"]
    assert (ruin["distribution"], ruin["broken"]) == ("ruin", True)
    assert ruin["where"].endswith("hooks.py:2")
    for message, broken in {
        "it implements a hook 'fabric_logers' that does not exist. Did you mean 'fabric_loggers'?": True,
        "strategy 'needy': needs nobody-has-this>=2": False,
        "strategy 'future': wrong contract version: 2, and this core speaks version 1": True,
        "The probe of accelerator 'dead' failed: OSError: the driver does not answer": True,
        "strategy 'ddp': clash: fabric-backends offers it too": False,
    }.items():
        assert told[message]["broken"] is broken
    assert any("The detection of cluster environment 'acme-cloud' failed" in message for message in told)
    assert "RuntimeError: built for another version" in fabric("doctor", env=acme).stdout.replace("\n", "")


def test_a_missing_package_alone_is_no_reason_for_the_doctor_to_fail(fabric: Run, site: Site) -> None:
    hooks = """
        from fabric_core import StrategySpec, hookimpl

        @hookimpl
        def fabric_strategies():
            yield StrategySpec("needy", "a.b:C", requires=("nobody-has-this",))
    """
    site.install("needy", hooks)
    found = answer(fabric, "doctor", env={"PYTHONPATH": str(site.folder)})
    broken = {problem["message"]: problem["broken"] for problem in found["problems"]}
    assert broken["strategy 'needy': needs nobody-has-this"] is False
    assert not any(broken.values())


# -- commands of other distributions --------------------------------------------------------------------------------


def test_commands_of_distributions_are_listed_and_work(fabric: Run, acme: dict[str, str]) -> None:
    told = fabric("--help", env=acme).stdout
    assert re.search(r"^  hello +Greet somebody\.$", told, re.MULTILINE)
    assert fabric("hello", "you", env=acme).stdout == "hello you\n"
    assert fabric("hello@ACME", "you", env=acme).stdout == "hello you\n"
    assert fabric("hello@other", "you", env=acme).returncode == 2


def test_a_broken_command_breaks_nothing_but_itself(fabric: Run, acme: dict[str, str]) -> None:
    assert "Cannot work." in fabric("--help", env=acme).stdout
    for name, message in (
        ("broken", "cannot be loaded from 'acme.no_such_module"),
        ("function", "no click command"),
    ):
        ended = fabric(name, env=acme)
        assert ended.returncode == 1
        assert message in ended.stderr
        assert "acme" in ended.stderr


def test_nobody_takes_the_name_of_one_of_our_commands(fabric: Run, acme: dict[str, str]) -> None:
    assert "SCRIPT" in fabric("run", "--help", env=acme).stdout


def test_two_commands_of_one_name_are_an_error_when_it_is_called(
    fabric: Run, acme: dict[str, str], site: Site
) -> None:
    site.install(
        "zeta", ACME.split("    def probe")[0] + ACME[ACME.index("    @hookimpl\n    def fabric_cli") :]
    )
    told = fabric("--help", env=acme).stdout
    assert "hello@acme" in told
    assert "hello@zeta" in told
    ended = fabric("hello", "you", env=acme)
    assert ended.returncode == 2
    assert (
        "Several distributions offer a command 'hello'. Say which: fabric hello@acme, fabric hello@zeta"
        in ended.stderr
    )
    assert fabric("hello@acme", "you", env=acme).stdout == "hello you\n"
