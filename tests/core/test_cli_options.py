"""Options of parts on the command line: whose word is whose, what is refused before anything starts, and the help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

from fabric_core import ConfigurationError, Fabric
from fabric_core.cli import words
from fabric_core.cli.flags import FLAGS, PART_KINDS, part_option
from fabric_core.cli.run import STARTING

resource = pytest.importorskip("resource", reason="tests the command on POSIX")

if TYPE_CHECKING:
    from conftest import Run, Site

ACME = """
    from fabric_core import LauncherSpec, PrecisionSpec, StrategySpec, hookimpl

    OPTIONS = "acme.options:Tuning"

    @hookimpl
    def fabric_strategies():
        yield StrategySpec("tuned", "acme.parts:Tuned", options_type=OPTIONS, options={"level": 2}, supports=("*",))
        yield StrategySpec("coarse", "acme.parts:Tuned", options_type="acme.options:Coarse")
        yield StrategySpec("free", "acme.parts:Tuned")

    @hookimpl
    def fabric_precisions():
        yield PrecisionSpec("thin", "acme.parts:Thin", options_type="acme.options:Coarse")
        yield PrecisionSpec("thin", "acme.parts:Thin", options_type=OPTIONS, strategies=("tuned",))
"""
OPTIONS = '''
    from __future__ import annotations
    from dataclasses import dataclass
    from typing import Literal

    @dataclass(frozen=True)
    class Coarse:
        """Few options.

        Attributes:
            grain: How coarse.
        """

        grain: float = 1.0

    @dataclass(frozen=True)
    class Tuning:
        """Some options.

        Attributes:
            level: How much of ``it``.
        """

        level: int
        mode: Literal["fast", "slow"] = "fast"
        note: str | None = None
'''
SHOW = """
import json, os, sys
open("started", "w").close()
print(json.dumps([sys.argv[1:], json.loads(os.environ.get("FABRIC_RUN", "{}"))]), flush=True)
"""


@pytest.fixture
def acme(site: Site) -> dict[str, str]:
    """An environment with a plugin that declares options."""
    site.install("acme", ACME, files={"options.py": OPTIONS})
    return {"PYTHONPATH": str(site.folder)}


@pytest.fixture(autouse=True)
def script(tmp_path: Path) -> Path:
    path = tmp_path / "show.py"
    path.write_text(SHOW)
    return path


# -- whose word is whose ----------------------------------------------------------------------------------------------


def sort(*args: str) -> words.Call:
    command = click.Command("run", add_help_option=False)
    return words.sort(args, (*FLAGS, *STARTING), click.Context(command, info_name="run"))


@pytest.mark.parametrize(
    ("args", "options", "theirs"),
    [
        (["x.py", "--strategy.stage", "3"], {"strategy": {"stage": "3"}}, []),
        (["--strategy.stage=3", "x.py"], {"strategy": {"stage": "3"}}, []),
        (["x.py", "--strategy.a=1", "--strategy.a=2"], {"strategy": {"a": "2"}}, []),
        (["x.py", "--strategy.pin-memory=a=b"], {"strategy": {"pin_memory": "a=b"}}, []),
        (["x.py", "--strategy.a="], {"strategy": {"a": ""}}, []),
        (["x.py", "--strategy.a", "-1"], {"strategy": {"a": "-1"}}, []),
        (
            ["--checkpoint-io.a=1", "x.py", "--checkpoint_io.b", "2", "--cluster-environment.c=3"],
            {"checkpoint io": {"a": "1", "b": "2"}, "cluster environment": {"c": "3"}},
            [],
        ),
        (
            ["x.py", "--accelerator.a=1", "--precision.b=2", "--launcher.c=3"],
            {"accelerator": {"a": "1"}, "precision": {"b": "2"}, "launcher": {"c": "3"}},
            [],
        ),
        (
            [
                "x.py",
                "--model.strategy=1",
                "--Strategy.a=1",
                "-strategy.a=1",
                "strategy.a=1",
                "--strategyx.a=1",
            ],
            {},
            ["--model.strategy=1", "--Strategy.a=1", "-strategy.a=1", "strategy.a=1", "--strategyx.a=1"],
        ),
        (["x.py", "--logger.a=1", "--optimizer.lr", "0.1"], {}, ["--logger.a=1", "--optimizer.lr", "0.1"]),
        (["x.py", "--", "--strategy.a=1"], {}, ["--strategy.a=1"]),
        (["model", "--strategy.a", "1", "x.py"], {"strategy": {"a": "1"}}, []),
    ],
)
def test_a_kind_and_a_dot_make_an_option_of_a_part_and_all_others_are_the_scripts(
    args: list[str], options: dict[str, Any], theirs: list[str]
) -> None:
    call = sort(*args)
    assert (call.target, call.options, list(call.args)) == ("x.py", options, theirs)
    assert call.flags == {}


def test_every_kind_has_its_spelling() -> None:
    for kind in PART_KINDS:
        for hyphen in "-_":
            assert part_option(f"--{kind.replace(' ', hyphen)}.some-name") == (kind, "some_name")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--stratgy.stage=3", {"--stratgy.stage": "--strategy.stage"}),
        ("--checkpointio.x=3", {"--checkpointio.x": "--checkpoint-io.x"}),
        ("--optimizer.lr=3", {}),
    ],
)
def test_a_near_miss_of_a_kind_is_noticed(word: str, meant: dict[str, str]) -> None:
    assert sort("x.py", word).near == meant


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["x.py", "--strategy.stage"], "The option --strategy.stage needs a value."),
        (["x.py", "--strategy.stage", "--devices=2"], "The option --strategy.stage needs a value."),
        (["x.py", "--devices", "--strategy.stage=2"], "The option --devices needs a value."),
        (["x.py", "--strategy.=2"], "Which option of the strategy? Write --strategy.NAME."),
    ],
)
def test_a_word_of_ours_that_is_incomplete_is_a_usage_error(args: list[str], message: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        sort(*args)
    assert caught.value.message == message


def test_options_reach_the_script_in_the_variable_of_fabric_run(fabric: Run, acme: dict[str, str]) -> None:
    ended = fabric("run", "show.py", "--strategy=tuned", "--lr=1", "--strategy.level=3", env=acme)
    assert ended.returncode == 0, ended.stderr
    run = {"strategy": "tuned", "options": {"strategy": {"level": "3"}}}
    assert json.loads(ended.stdout) == [["--lr=1"], run]


# -- refused before anything starts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [[], ["--devices=2", "--accelerator=cpu"]], ids=["in place", "two ranks"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--strategy=tuned", "--strategy.lvel=3"],
            (
                "The strategy 'tuned' has no option 'lvel', which the command line states. Did you mean 'level'? "
                "It has: level, mode, note."
            ),
        ),
        (
            ["--strategy=tuned", "--strategy.level=high"],
            "The strategy 'tuned' cannot take level='high' from the command line: it has to be a whole number.",
        ),
        (
            ["--precision=thin", "--precision.nothing=1"],
            "The precision 'thin' has no option 'nothing', which the command line states. It has: grain.",
        ),
    ],
)
def test_what_a_named_part_does_not_take_fails_before_a_process_is_started(
    fabric: Run, acme: dict[str, str], tmp_path: Path, how: list[str], args: list[str], message: str
) -> None:
    ended = fabric("run", *how, *args, "show.py", env=acme)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"fabric: {message}\n")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("how", [[], ["--devices=1", "--accelerator=cpu"]], ids=["in place", "a rank"])
def test_what_the_command_line_does_not_decide_is_left_to_the_script(
    fabric: Run, acme: dict[str, str], how: list[str]
) -> None:
    """Whose options they are, only the script can know: which strategy it names, and for which a precision is made."""
    for args in (["--strategy.what=1"], ["--precision=thin", "--precision.level=1"], ["--checkpoint-io.x=1"]):
        ended = fabric("run", *how, *args, "show.py", env=acme)
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)[1]["options"]


def test_a_file_of_options_is_read_before_a_process_is_started(
    fabric: Run, acme: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "fabric.toml").write_text("[strategy.tuned]\nlvel = 3\n")
    ended = fabric("run", "--devices=1", "--accelerator=cpu", "--strategy=tuned", "show.py", env=acme)
    assert ended.returncode == 2
    assert ended.stderr == (
        "fabric: The strategy 'tuned' has no option 'lvel', which [strategy.tuned] in "
        f"{tmp_path / 'fabric.toml'} states. Did you mean 'level'? It has: level, mode, note.\n"
    )
    (tmp_path / "fabric.toml").write_text("[strategy.tuned]\n\nlevel = \n")
    ended = fabric("run", "--devices=1", "--accelerator=cpu", "show.py", env=acme)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "fabric.toml is no valid TOML" in ended.stderr
    assert "line 3" in ended.stderr
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("how", "env", "who"),
    [
        (["--devices=2", "--accelerator=cpu"], {}, "fabric run"),
        ([], {"FABRIC_LAUNCHED": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "local"),
    ],
)
def test_options_of_a_launcher_are_refused_where_no_launcher_starts_anything(
    fabric: Run, tmp_path: Path, how: list[str], env: dict[str, str], who: str
) -> None:
    ended = fabric("run", *how, "--launcher.patience=3", "show.py", env=env)
    assert ended.returncode == 2, ended.stdout
    assert ended.stderr == (
        f"fabric: --launcher.patience cannot be given here: {who!r} starts the processes, and no launcher does.\n"
    )


@pytest.mark.parametrize("options", ["3", '{"strategy": 3}', '{"strategy": {"x": 3}}'])
def test_what_fabric_run_has_not_written_is_refused(
    core_alone: Any, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.setenv("FABRIC_RUN", f'{{"options": {options}}}')
    with pytest.raises(ConfigurationError, match=r"which 'fabric run' has not written\. Remove it\."):
        Fabric()


# -- help -------------------------------------------------------------------------------------------------------------


def test_the_help_lists_the_options_of_the_strategy_that_is_named_and_no_others(
    fabric: Run, acme: dict[str, str]
) -> None:
    for args in (
        ["--strategy", "tuned", "--help"],
        ["-h", "--strategy=tuned"],
        ["--help", "x.py", "--strategy=tuned"],
    ):
        ended = fabric("run", *args, env=acme)
        assert ended.returncode == 0, ended.stderr
        _, title, listed = ended.stdout.partition("Options of the strategy 'tuned':\n")
        assert title, ended.stdout
        lines = [line.strip() for line in listed.strip().splitlines()]
        assert lines == [
            "--strategy.level  How much of it. [a whole number; default: 2]",
            "--strategy.mode   [one of 'fast', 'slow'; default: 'fast']",
            "--strategy.note   [a text]",
        ]


def test_the_help_on_a_precision_is_on_the_one_that_is_made_for_the_strategy(
    fabric: Run, acme: dict[str, str]
) -> None:
    ended = fabric("run", "--strategy=tuned", "--precision=thin", "--help", env=acme)
    assert "Options of the precision 'thin' for tuned:\n  --precision.level" in ended.stdout
    assert "--precision.grain" not in ended.stdout
    ended = fabric("run", "--precision=thin", "--help", env=acme)
    assert "Options of the precision 'thin':\n  --precision.grain  How coarse." in ended.stdout
    assert "Options of the precision 'thin' for tuned:\n  --precision.level" in ended.stdout


def test_the_help_says_where_there_is_nothing_to_list(fabric: Run, acme: dict[str, str]) -> None:
    ended = fabric("explain", "--strategy=free", "--accelerator=cpu", "--help", env=acme)
    assert "Options of the strategy 'free':\n  It does not say which it has." in ended.stdout
    assert "Options of the accelerator 'cpu':\n  It has none." in ended.stdout


def test_the_help_by_itself_and_with_auto_is_on_no_part(fabric: Run) -> None:
    for args in ([], ["--strategy=auto"], ["--strategy=package.module:Class"]):
        ended = fabric("run", *args, "--help")
        assert ended.returncode == 0
        assert "Options of" not in ended.stdout


def test_the_help_on_an_unknown_name_says_so(fabric: Run) -> None:
    ended = fabric("run", "--strategy=ddpp", "--help")
    assert ended.returncode == 2
    assert "No strategy is named 'ddpp'. Did you mean 'ddp'?" in ended.stderr


@pytest.mark.parametrize("command", ["run", "explain"])
def test_the_help_on_a_part_imports_no_torch_and_fits_into_eighty_columns(
    fabric: Run, tmp_path: Path, command: str
) -> None:
    (tmp_path / "torch.py").write_text("import os\nos._exit(77)")
    for strategy in ("deepspeed", "fsdp", "xla_fsdp"):
        ended = fabric(command, "--strategy", strategy, "--help", env={"PYTHONPATH": str(tmp_path)})
        assert ended.returncode == 0
        assert f"Options of the strategy {strategy!r}:" in ended.stdout
        assert max(map(len, ended.stdout.splitlines())) <= 80


def test_the_help_by_itself_takes_an_eighth_of_a_second_of_cpu_time(fabric: Run, least: Any) -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        fabric("run", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert least(seconds, 0.120) < 0.120


# -- explain ----------------------------------------------------------------------------------------------------------


def test_explain_shows_each_option_and_who_states_it(
    fabric: Run, acme: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "fabric.toml").write_text("[strategy.tuned]\nmode = 'slow'\nnote = 'from the file'\n")
    args = ["explain", "--accelerator=cpu", "--strategy", "tuned", "--strategy.note", "a word"]
    ended = fabric(*args, "--json", env=acme)
    assert ended.returncode == 0, ended.stderr
    (part,) = (part for part in json.loads(ended.stdout)["parts"] if part["kind"] == "strategy")
    assert part["options"] == {"level": 2, "mode": "slow", "note": "a word"}
    assert part["origins"] == {
        "level": "the preset",
        "mode": f"[strategy.tuned] in {tmp_path / 'fabric.toml'}",
        "note": "the command line",
    }
    shown = " ".join(fabric(*args, env=acme).stdout.split())
    assert "level = 2, by the preset" in shown
    assert "note = 'a word', by the command line" in shown


def test_explain_refuses_what_the_part_refuses(fabric: Run, acme: dict[str, str]) -> None:
    ended = fabric("explain", "--accelerator=cpu", "--strategy=tuned", "--strategy.mode=odd", env=acme)
    assert ended.returncode == 2
    assert "cannot take mode='odd' from the command line: it has to be one of 'fast', 'slow'." in ended.stderr
    ended = fabric("explain", "--strategy.mode")
    assert ended.returncode == 2
    assert "The option --strategy.mode needs a value." in ended.stderr
