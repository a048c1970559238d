"""``fabric run``: whose word is whose, what the script sees, and how it all ends. Every command is run for real."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import psutil
import pytest

from fabric_core.cli import words
from fabric_core.cli.flags import FLAGS
from fabric_core.cli.run import STARTING

if TYPE_CHECKING:
    from conftest import Run

SHOW = """
import json, os, sys
names = ("FABRIC_RUN", "FABRIC_LAUNCHED", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
seen = {name: os.environ[name] for name in names if name in os.environ}
print(json.dumps({"argv": sys.argv[1:], "pid": os.getpid(), "folder": sys.path[0], "environ": seen}), flush=True)
"""


@pytest.fixture
def clean_environ(clean_environ: dict[str, str]) -> dict[str, str]:
    """Nothing that runs here needs PyTorch, so nobody imports it for the ranks."""
    return {**clean_environ, "FABRIC_START": "fresh"}


@pytest.fixture(autouse=True)
def script(tmp_path: Path) -> Path:
    path = tmp_path / "show.py"
    path.write_text(SHOW)
    return path


def shown(ended: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What every process of the script has seen, by rank."""
    assert ended.returncode == 0, ended.stderr
    seen = [json.loads(line) for line in ended.stdout.splitlines()]
    return sorted(seen, key=lambda one: int(one["environ"].get("RANK", 0)))


def given(one: dict[str, Any]) -> dict[str, str]:
    """The flags that reached a process."""
    return json.loads(one["environ"].get("FABRIC_RUN", "{}"))


# -- whose word is whose ---------------------------------------------------------------------------------------------


def sort(*args: str) -> words.Call:
    command = click.Command("run", add_help_option=False)
    return words.sort(args, (*FLAGS, *STARTING), click.Context(command, info_name="run"))


@pytest.mark.parametrize(
    ("args", "flags", "theirs"),
    [
        (["x.py"], {}, []),
        (["--devices=2", "x.py"], {"devices": "2"}, []),
        (["--devices", "2", "x.py"], {"devices": "2"}, []),
        (["x.py", "--devices", "2"], {"devices": "2"}, []),
        (["x.py", "--devices=-1"], {"devices": "-1"}, []),
        (["x.py", "--devices", "-1"], {"devices": "-1"}, []),
        (["x.py", "--devices", "0,1"], {"devices": "0,1"}, []),
        (["x.py", "--num_nodes=2"], {"num_nodes": "2"}, []),
        (["x.py", "--num-nodes", "2"], {"num_nodes": "2"}, []),
        (["--main_port", "1", "x.py", "--node-rank=0"], {"main_port": "1", "node_rank": "0"}, []),
        (["x.py", "--devices=1", "--devices=2"], {"devices": "2"}, []),
        (["x.py", "--strategy="], {"strategy": ""}, []),
        (
            ["x.py", "--lr", "0.1", "--strategy=s", "-v", "data"],
            {"strategy": "s"},
            ["--lr", "0.1", "-v", "data"],
        ),
        (["--lr=0.1", "x.py", "--wd=1"], {}, ["--lr=0.1", "--wd=1"]),
        (["x.py", "--strat=s", "--dev", "2", "--device=1"], {}, ["--strat=s", "--dev", "2", "--device=1"]),
        (["x.py", "--Devices=2", "-devices=2", "devices=2"], {}, ["--Devices=2", "-devices=2", "devices=2"]),
        (["x.py", "--", "--devices=2", "--", "-m"], {}, ["--devices=2", "--", "-m"]),
        (["x.py", "--devices=1", "--", "--devices=2"], {"devices": "1"}, ["--devices=2"]),
        (["--devices=1", "--", "x.py", "--devices=2"], {"devices": "1"}, ["--devices=2"]),
        (["--", "x.py"], {}, []),
        (["x.py", "--"], {}, []),
        (["x.py", "--help", "-h", "-m", "y"], {}, ["--help", "-h", "-m", "y"]),
        (["x.py", "model", "y.py"], {}, ["model", "y.py"]),
        (["model", "x.py", "a"], {}, ["a"]),
        (["model", "--devices", "2", "x.py"], {"devices": "2"}, []),
        (
            ["--devices=2", "model", "--strategy=s", "x.py", "--epochs=3"],
            {"devices": "2", "strategy": "s"},
            ["--epochs=3"],
        ),
        (["model", "--", "x.py", "b"], {}, ["b"]),
        (["x.py", ""], {}, [""]),
    ],
)
def test_our_options_are_taken_before_and_after_the_script_and_all_others_are_its_own(
    args: list[str], flags: dict[str, str], theirs: list[str]
) -> None:
    call = sort(*args)
    assert (call.target, call.is_module) == ("x.py", False)
    assert call.flags == flags
    assert list(call.args) == theirs


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (["x.py", "--device=2"], {"--device": "--devices"}),
        (["--strategey=s", "x.py"], {"--strategey": "--strategy"}),
        (["x.py", "--num_node", "2", "-devices=2"], {"--num_node": "--num-nodes", "-devices": "--devices"}),
        (["x.py", "--Precision=32"], {"--Precision": "--precision"}),
        (["x.py", "--", "--device=2"], {}),
        (["x.py", "device", "--num-workers=2", "--prediction=x", "--dev", "2", "-d", "--nodes"], {}),
    ],
)
def test_a_near_miss_of_our_options_is_noticed_and_the_scripts_all_the_same(
    args: list[str], near: dict[str, str]
) -> None:
    call = sort(*args)
    assert call.near == near
    assert set(near) <= {word.partition("=")[0] for word in call.args}


@pytest.mark.parametrize(
    ("args", "target", "is_module", "theirs"),
    [
        (["-m", "package.module", "a"], "package.module", True, ["a"]),
        (["--module", "package.module"], "package.module", True, []),
        (["--devices=2", "-m", "package.module", "--strategy=s", "-m"], "package.module", True, ["-m"]),
        (["model", "-m", "package.module"], "package.module", True, []),
        (["model"], "model", False, []),
        (["model", "--devices=2"], "model", False, []),
        (["model", "--devices", "2"], "model", False, []),
        (["model", "--epochs=3"], "model", False, ["--epochs=3"]),
        (["./model", "x.py"], "./model", False, ["x.py"]),
        (["-m", "model"], "model", True, []),
    ],
)
def test_a_module_and_a_script_called_model_are_understood(
    args: list[str], target: str, is_module: bool, theirs: list[str]
) -> None:
    call = sort(*args)
    assert (call.target, call.is_module, list(call.args)) == (target, is_module, theirs)


@pytest.mark.parametrize("args", [[], ["--devices=2"], ["--"], ["-m"], ["--lr=1"], ["model", "--"]])
def test_no_script_is_a_usage_error(args: list[str]) -> None:
    with pytest.raises(click.UsageError, match="Which script"):
        sort(*args)


@pytest.mark.parametrize(
    "args", [["x.py", "--devices"], ["x.py", "--devices", "--strategy=s"], ["--devices", "--", "x"]]
)
def test_an_option_of_ours_without_a_value_is_a_usage_error(args: list[str]) -> None:
    with pytest.raises(click.UsageError, match="--devices needs a value"):
        sort(*args)


# -- what the script sees --------------------------------------------------------------------------------------------


def test_the_flags_reach_every_rank_and_only_those_that_were_given(fabric: Run) -> None:
    line = [
        "run",
        "model",
        "./show.py",
        "--strategy=single_device",
        "--accelerator",
        "cpu",
        "--devices=1",
        "--lr",
        "1",
    ]
    (one,) = shown(fabric(*line))
    assert given(one) == {"strategy": "single_device", "accelerator": "cpu", "devices": "1"}
    assert one["argv"] == ["--lr", "1"]


@pytest.mark.parametrize("start", ["fresh", "warm"])
def test_devices_start_that_many_ranks(fabric: Run, start: str) -> None:
    flags = ("--devices=2", "--accelerator=cpu", "--strategy=ddp", f"--start={start}")
    ended = fabric("run", "show.py", *flags, "-x")
    zero, one = shown(ended)
    assert [(r["environ"]["RANK"], r["environ"]["LOCAL_RANK"], r["argv"]) for r in (zero, one)] == [
        ("0", "0", ["-x"]),
        ("1", "1", ["-x"]),
    ]
    assert {r["environ"]["WORLD_SIZE"] for r in (zero, one)} == {"2"}
    assert zero["environ"]["MASTER_ADDR"] == "127.0.0.1"
    assert zero["environ"]["MASTER_PORT"] == one["environ"]["MASTER_PORT"]
    assert zero["pid"] != one["pid"]


def test_without_devices_the_script_runs_in_this_very_process(
    clean_environ: dict[str, str], tmp_path: Path
) -> None:
    command = [str(Path(sys.executable).with_name("fabric")), "run", "show.py", "--precision=32", "a"]
    with subprocess.Popen(
        command, env=clean_environ, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as process:
        seen = json.loads(process.communicate(timeout=60)[0])
    assert seen["pid"] == process.pid
    assert (seen["argv"], seen["folder"]) == (["a"], str(tmp_path))
    assert seen["environ"] == {"FABRIC_RUN": '{"precision": "32"}'}


def test_flags_of_an_outer_run_do_not_leak_into_an_inner_one(fabric: Run) -> None:
    (one,) = shown(fabric("run", "show.py", env={"FABRIC_RUN": '{"strategy": "of the outer run"}'}))
    assert "FABRIC_RUN" not in one["environ"]


def test_a_module_is_run_as_python_runs_it(fabric: Run, tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__main__.py").write_text(SHOW)
    for flags in ((), ("--devices=1",)):
        (one,) = shown(fabric("run", *flags, "-m", "pack", "a", "--", "--devices=3"))
        assert one["argv"] == ["a", "--devices=3"]


def test_what_follows_the_double_dash_reaches_the_script_word_for_word(fabric: Run) -> None:
    (one,) = shown(fabric("run", "show.py", "--devices=1", "--", "--devices=2", "--", "a b", ""))
    assert one["argv"] == ["--devices=2", "--", "a b", ""]
    assert given(one) == {"devices": "1"}


def test_a_script_needs_no_suffix_and_may_be_a_folder(fabric: Run, tmp_path: Path, script: Path) -> None:
    script.rename(tmp_path / "model")
    assert shown(fabric("run", "model"))[0]["argv"] == []
    assert shown(fabric("run", "./model", "a"))[0]["argv"] == ["a"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text(SHOW)
    assert shown(fabric("run", "folder", "b"))[0]["argv"] == ["b"]


def test_a_strategy_may_be_a_class_beside_the_script(fabric: Run, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "mine.py").write_text(
        "from fabric_core import Strategy, StrategySpec\n"
        "class Mine(Strategy):\n"
        "    spec = StrategySpec('mine', 'mine:Mine', supports=('*',))\n"
    )
    (tmp_path / "deep" / "show.py").write_text(SHOW)
    ranks = shown(fabric("run", "deep/show.py", "--strategy=mine:Mine", "--devices=2", "--accelerator=cpu"))
    assert [given(one)["strategy"] for one in ranks] == ["mine:Mine"] * 2


def test_a_near_miss_is_told_in_one_line(fabric: Run) -> None:
    ended = fabric("run", "show.py", "--device=2", "--", "--strategey=s")
    assert shown(ended)[0]["argv"] == ["--device=2", "--strategey=s"]
    assert ended.stderr == (
        "fabric run: '--device' is not an option of ours and goes to the script; did you mean '--devices'?\n"
    )


READ = "import os, sys; print(os.environ['RANK'], os.read(0, 99), flush=True)"


def test_only_rank_0_reads_the_standard_input(fabric: Run, tmp_path: Path) -> None:
    (tmp_path / "read.py").write_text(READ)
    ended = fabric("run", "read.py", "--devices=2", "--accelerator=cpu", stdin="hello")
    assert sorted(ended.stdout.splitlines()) == ["0 b'hello'", "1 b''"], ended.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="closes a descriptor in a shell")
def test_a_closed_standard_input_is_an_empty_one(clean_environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "read.py").write_text(READ)
    command = f"{Path(sys.executable).with_name('fabric')} run read.py --devices=2 --accelerator=cpu <&-"
    ended = subprocess.run(
        ["sh", "-c", command], env=clean_environ, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert sorted(ended.stdout.splitlines()) == ["0 b''", "1 b''"], ended.stderr


# -- jobs of several nodes, and jobs that others have started -----------------------------------------------------


def test_two_nodes_make_one_job(clean_environ: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("fabric")),
        "run",
        "show.py",
        "--num-nodes=2",
        "--devices=1",
    ]
    command += ["--accelerator=cpu", "--main-address=127.0.0.1", f"--main-port={port}"]
    nodes = [
        subprocess.Popen(
            [*command, f"--node-rank={rank}"], env=clean_environ, cwd=tmp_path, stdout=subprocess.PIPE
        )
        for rank in (0, 1)
    ]
    seen = [json.loads(node.communicate(timeout=60)[0])["environ"] for node in nodes]
    assert [(one["RANK"], one["NODE_RANK"], one["WORLD_SIZE"]) for one in seen] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert {(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in seen} == {("127.0.0.1", str(port))}


STARTED = {"FABRIC_LAUNCHED": "1", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def test_processes_that_something_else_has_started_are_not_started_again(fabric: Run) -> None:
    (one,) = shown(fabric("run", "show.py", "--devices=2", "--strategy=ddp", env=STARTED))
    assert (one["environ"]["RANK"], one["environ"]["WORLD_SIZE"]) == ("1", "2")
    assert given(one) == {"devices": "2", "strategy": "ddp"}


def test_under_torchrun_the_script_runs_in_place(python: Run, tmp_path: Path) -> None:
    ended = python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "fabric_core", "run", "show.py", "--devices=2", "--strategy=ddp", "--accelerator=cpu",
        env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    ranks = shown(ended)
    assert [one["environ"]["RANK"] for one in ranks] == ["0", "1"]
    assert {one["environ"]["WORLD_SIZE"] for one in ranks} == {"2"}
    assert all("FABRIC_LAUNCHED" not in one["environ"] for one in ranks)


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [(), ("--devices=2",)])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--strategy=ddpp",), "No strategy is named 'ddpp'. Did you mean 'ddp'? Installed: "),
        (("--accelerator=gpux",), "No accelerator is named 'gpux'."),
        (("--precision=fp12",), "No precision is named 'fp12'."),
    ],
)
def test_an_unknown_name_is_one_clear_error_before_anything_starts(
    fabric: Run, start: tuple[str, ...], flags: tuple[str, ...], message: str
) -> None:
    ended = fabric("run", "show.py", *start, *flags)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"fabric: {message}")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--devices=two",), 2, "devices='two' is not understood"),
        (("--devices=-3",), 2, "devices=-3 is negative"),
        (("--devices=0,0",), 2, "names a device twice"),
        (("--devices=",), 2, "devices='' is empty"),
        (("--devices=2", "--strategy=single_device"), 2, "at most 1 device"),
        (("--num-nodes=0",), 2, "num_nodes='0' has to be a whole number"),
        (("--num-nodes=2",), 2, "--num-nodes=2 needs --main-address"),
        (
            ("--num-nodes=2", "--main-address=127.0.0.1", "--node-rank=2"),
            2,
            "--node-rank=2 has to be .* from 0 to 1",
        ),
        (("--devices=1", "--node-rank=1"), 2, "--node-rank=1 has to be a whole number from 0 to 0"),
        (("--devices=1", "--node-rank=first"), 2, "--node-rank=first has to be a whole number"),
        (
            ("--devices=1", "--main-port=70000"),
            2,
            "--main-port=70000 has to be a whole number from 1 to 65535",
        ),
        (("--main-port=29500",), 2, "--main-port without --devices"),
        (("--strategy=nowhere:Class", "--devices=1"), 1, "cannot be loaded from 'nowhere:Class'"),
    ],
)
def test_flags_that_make_no_sense_are_one_clear_error(
    fabric: Run, flags: tuple[str, ...], code: int, message: str
) -> None:
    ended = fabric("run", "show.py", "--accelerator=cpu", *flags)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.startswith("fabric: ")
    assert "Traceback" not in ended.stderr
    assert re.search(message, ended.stderr), ended.stderr


def test_a_meeting_point_is_refused_where_others_have_started_the_processes(fabric: Run) -> None:
    ended = fabric("run", "show.py", "--main-port=29500", env=STARTED)
    assert ended.returncode == 2
    assert "--main-port cannot be given here: 'local' has started the processes" in ended.stderr


def test_a_port_that_is_taken_is_an_error_before_anything_starts(fabric: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = fabric("run", "show.py", "--devices=1", f"--main-port={port}")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert f"fabric: Cannot listen on 127.0.0.1 port {port}: it is already in use" in ended.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("shwo.py",), "There is no script 'shwo.py' in .* Did you mean 'show.py'?"),
        (("deep/show.py",), "There is no folder 'deep' either"),
        (("q",), "Scripts there: show.py"),
        (("empty",), "'empty' is a folder without a __main__.py"),
        (
            ("--stratgy", "ddp", "show.py"),
            "no script 'ddp'.*'--stratgy' before it is no option.*mean '--strategy'",
        ),
        (("--lr", "0.1", "show.py"), "Options of the script that have a value come after the script"),
    ],
)
def test_a_script_that_is_not_there_is_answered_with_what_is(
    fabric: Run, tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    ended = fabric("run", *args)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.search(message, ended.stderr), ended.stderr


# -- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--devices=1",)])
@pytest.mark.parametrize(
    ("code", "exit_code"), [("import sys; sys.exit(7)", 7), ("1 / 0", 1), ("import sys; sys.exit('no')", 1)]
)
def test_the_exit_code_is_that_of_the_script(
    fabric: Run, script: Path, flags: tuple[str, ...], code: str, exit_code: int
) -> None:
    script.write_text(code)
    assert fabric("run", "show.py", *flags).returncode == exit_code


def test_the_first_failing_rank_is_what_the_user_sees_last(fabric: Run, script: Path) -> None:
    script.write_text(
        "import os, time\nif os.environ['RANK'] == '1': raise ValueError('of rank 1')\ntime.sleep(50)\n"
    )
    started = time.monotonic()
    ended = fabric("run", "show.py", "--devices=2", "--accelerator=cpu", "--strategy=ddp")
    assert time.monotonic() - started < 20
    assert ended.returncode == 1
    assert ended.stderr.endswith("ValueError: of rank 1\n")
    assert "fabric_core" not in ended.stderr


@pytest.mark.parametrize("flags", [(), ("--devices=1",)])
def test_standard_input_reaches_the_script(fabric: Run, script: Path, flags: tuple[str, ...]) -> None:
    script.write_text("print(input())")
    assert fabric("run", "show.py", *flags, stdin="a line\n").stdout == "a line\n"


WAIT = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(50)\n"


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("flags", [(), ("--devices=2", "--strategy=ddp", "--accelerator=cpu")])
def test_an_interrupt_ends_everything(
    clean_environ: dict[str, str], tmp_path: Path, script: Path, flags: tuple[str, ...]
) -> None:
    script.write_text(WAIT)
    command = [str(Path(sys.executable).with_name("fabric")), "run", "show.py", *flags]
    with subprocess.Popen(
        command, env=clean_environ, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(2 if flags else 1)]
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)  # they would have slept for longer
    assert process.returncode in (130, -signal.SIGINT)
    assert told.count("Traceback") <= (0 if flags else 1)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_starting_ranks_imports_no_torch(fabric: Run, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('somebody imported torch')")
    flags = ("--devices=2", "--strategy=ddp", "--accelerator=cpu")
    ended = fabric("run", "show.py", *flags, env={"PYTHONPATH": str(tmp_path)})
    assert len(shown(ended)) == 2
