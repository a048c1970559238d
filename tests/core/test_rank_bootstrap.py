"""The program that every rank runs, compared with the interpreter itself; and processes that die with their parent."""

from __future__ import annotations

import json
import os
import py_compile
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from fabric_core.errors import LaunchError
from fabric_core.supervisor import RankCommand, current_command

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")

BOOTSTRAP = ("-m", "fabric_core.rank")

FACTS = """
import json, os, sys
import {sibling}
main = sys.modules["__main__"]
print(json.dumps({{
    "is main": main.__dict__ is globals(),
    "name": __name__,
    "file": __file__,
    "spec": __spec__ and [__spec__.name, __spec__.origin],
    "package": __package__,
    "cached": globals().get("__cached__", "absent"),
    "loader": type(__loader__).__name__,
    "loader's path": getattr(__loader__, "path", None),
    "builtins": type(__builtins__).__name__,
    "code": sys._getframe().f_code.co_filename,
    "inherited": sys._getframe().f_code.co_flags,
    "argv": sys.argv,
    "path": sys.path,
    "flags": str(sys.flags),
    "warnings": sys.warnoptions,
    "X": sorted(sys._xoptions),
    "sibling": {sibling}.__file__,
    "ours": sorted(name for name in os.environ if name.startswith("FABRIC")),
}}))
"""


def python(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FABRIC")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=30,
    )


def write(path: Path, source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source))
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Programs of every form that the interpreter runs, with a module beside each that it must find."""
    for name in ("sibling", "folder/sibling", "elsewhere/sibling", "elsewhere/json"):
        write(tmp_path / f"{name}.py", "")
    facts = FACTS.format(sibling="sibling")
    write(tmp_path / "train.py", facts)
    write(tmp_path / "folder/__main__.py", facts)
    write(tmp_path / "folder/script.py", facts)
    os.symlink(tmp_path / "folder/script.py", tmp_path / "link.py")
    py_compile.compile(str(tmp_path / "train.py"), str(tmp_path / "compiled.pyc"))
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", facts)
        archive.writestr("sibling.py", "")
    package = FACTS.format(sibling="package.sibling").replace(
        "import package.sibling", "from . import sibling"
    )
    package = package.replace("package.sibling.__file__", "sibling.__file__")
    for name in ("package/__init__", "package/sibling"):
        write(tmp_path / f"{name}.py", "")
    write(tmp_path / "package/module.py", package)
    write(tmp_path / "package/__main__.py", package)
    return tmp_path


@pytest.mark.parametrize(
    ("target", "flags", "folder"),
    [
        (["train.py", "--lr", "0.1", "--module"], [], "."),
        (["../train.py"], ["-O", "-W", "error", "-X", "utf8"], "folder"),
        (["./link.py"], ["-X", "dev"], "."),
        (["compiled.pyc"], [], "."),
        (["folder"], [], "."),
        (["archive.zip", "x"], [], "."),
        (["-m", "train", "x"], [], "."),
        (["-m", "package.module", "-m", "x"], ["-B"], "."),
        (["-m", "package"], [], "."),
        pytest.param(
            ["../elsewhere/../train.py"],
            ["-P"],
            "folder",
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="-P is newer"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_program_sees_what_it_would_see_under_the_interpreter(project, target, flags, folder):
    ours = ["--module", *target[1:]] if target[0] == "-m" else target
    # Without its own folder on the path (-P) a program finds its modules where the user says.
    path = {"PYTHONPATH": str(project)} if flags == ["-P"] else {}
    plain = python(*flags, *target, cwd=project / folder, **path)
    rank = python(*flags, *BOOTSTRAP, *ours, cwd=project / folder, **path)
    assert (plain.returncode, rank.returncode) == (0, 0), plain.stderr + rank.stderr
    assert json.loads(rank.stdout) == json.loads(plain.stdout)


def test_files_of_the_working_directory_do_not_hide_standard_modules(project):
    rank = python(*BOOTSTRAP, "../train.py", cwd=project / "elsewhere")
    assert rank.returncode == 0, rank.stderr


PROGRAMS = {
    "raises in a function": "def f():\n    1 / 0\nf()",
    "raises from": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise ValueError('x\\ny') from error",
    "does not compile": "def f(:\n    pass",
    "raises while it imports": "import broken",
    "exits with 3": "raise SystemExit(3)",
    "exits with a message": "import sys\nsys.exit('no data')",
    "exits with an object": "import sys\nsys.exit(['a', 1])",
    "has a hook": "import sys\nsys.excepthook = lambda *a: print('hook:', a[1], file=sys.stderr)\n1 / 0",
    "ends in a function registered to run last": "import atexit\natexit.register(print, 'last')\n1 / 0",
    "raises a group": "raise getattr(__builtins__, 'ExceptionGroup', RuntimeError)('x', [OSError(1)])",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_ends_as_it_would_under_the_interpreter(tmp_path, name):
    write(tmp_path / "train.py", PROGRAMS[name])
    write(tmp_path / "broken.py", "import nothing_of_this_name")
    plain = python("train.py", cwd=tmp_path)
    rank = python(*BOOTSTRAP, "train.py", cwd=tmp_path)
    assert (rank.returncode, rank.stdout, rank.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_a_module_that_is_not_there_is_told_as_the_interpreter_tells_it(tmp_path):
    rank = python(*BOOTSTRAP, "--module", "nowhere", cwd=tmp_path)
    assert (rank.returncode, rank.stderr) == (1, f"{sys.executable}: No module named nowhere\n")


def test_a_package_that_raises_shows_only_its_own_frames(tmp_path):
    write(tmp_path / "package/__init__.py", "1 / 0")
    write(tmp_path / "package/module.py", "")
    rank = python(*BOOTSTRAP, "--module", "package.module", cwd=tmp_path)
    assert rank.returncode == 1
    assert [line for line in rank.stderr.splitlines() if "File" in line] == [
        f'  File "{tmp_path}/package/__init__.py", line 1, in <module>'
    ]


def test_an_interrupt_ends_a_program_in_silence(tmp_path):
    write(
        tmp_path / "train.py", "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
    )
    rank = python(*BOOTSTRAP, "train.py", cwd=tmp_path)
    assert (rank.returncode, rank.stderr) == (130, "")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_classes_of_the_script_can_be_pickled_and_reach_processes_that_it_starts(tmp_path, method):
    source = f"""
    import multiprocessing, pickle

    class Point:
        def __init__(self, x):
            self.x = x
        def __eq__(self, other):
            return type(self) is type(other) and self.x == other.x

    def double(point):
        return Point(2 * point.x)

    if __name__ == "__main__":
        assert pickle.loads(pickle.dumps(Point(1))) == Point(1)
        with multiprocessing.get_context("{method}").Pool(1) as pool:
            assert pool.map(double, [Point(3)]) == [Point(6)]
            pool.close()
            pool.join()
    """
    write(tmp_path / "train.py", source)
    rank = python(*BOOTSTRAP, "train.py", cwd=tmp_path)
    assert (rank.returncode, rank.stderr) == (0, "")


SUPERVISED = """
import sys
from fabric_core.supervisor import RankCommand, run_ranks
sys.exit(run_ranks(RankCommand(sys.argv[2], sys.argv[1] == "-m", tuple(sys.argv[3:])), num_processes=2))
"""


def test_the_flags_of_the_interpreter_reach_the_ranks_and_development_mode_has_no_complaints(tmp_path):
    write(tmp_path / "train.py", CHECKED_FLAGS)
    flags = ["-O", "-X", "dev", "-W", "error::UserWarning"]
    job = python(*flags, "-c", SUPERVISED, "-", "train.py", "--devices", "2", cwd=tmp_path)
    assert (job.returncode, job.stderr) == (0, "")


CHECKED_FLAGS = """
import sys
seen = (sys.flags.optimize, sys.flags.dev_mode, "error::UserWarning" in sys.warnoptions, sys.argv[1:])
if seen != (1, True, True, ["--devices", "2"]):
    raise SystemExit(str(seen))
"""


PLAIN = """\
Traceback (most recent call last):
  File "{path}", line 5, in <module>
    raise ValueError("boom")
ValueError: boom
"""


def test_a_module_runs_on_every_rank(tmp_path):
    write(tmp_path / "package/__init__.py", "")
    write(tmp_path / "package/names.py", "WHO = 'rank'")
    write(
        tmp_path / "package/train.py",
        "import os\nfrom .names import WHO\nopen(WHO + os.environ['RANK'], 'w')",
    )
    job = python("-c", SUPERVISED, "-m", "package.train", cwd=tmp_path)
    assert (job.returncode, job.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.glob("rank?")) == ["rank0", "rank1"]


@pytest.mark.parametrize(
    ("hook", "shown"),
    [
        ('print(f"<<{error} at line {tb.tb_lineno}>>", file=sys.stderr)', "<<boom at line 5>>\n"),
        ("None", PLAIN),
        # A mark before each line is dropped, because the headline names the rank.
        ("[print('[rank1]:', line, file=sys.stderr) for line in PLAIN.splitlines()]", PLAIN),
    ],
    ids=["its own form", "no form", "a mark"],
)
def test_the_hook_that_a_program_has_set_writes_the_last_traceback(tmp_path, hook, shown):
    source = f"""
    import os, sys, time; PLAIN = os.environ["PLAIN"]
    sys.excepthook = lambda kind, error, tb: {hook}
    if os.environ["RANK"] == "1":
        raise ValueError("boom")
    time.sleep(60)
    """
    script = write(tmp_path / "train.py", source)
    shown = shown.format(path=script)
    job = python("-c", SUPERVISED, "-", "train.py", cwd=tmp_path, PLAIN=shown)
    assert job.stderr == f"fabric: rank 1 failed: ValueError: boom\n{shown}"


# ------------------------------------------------------------------------------------ starting the program again

AGAIN = """
import os, sys
from fabric_core.supervisor import current_command, run_ranks
if "FABRIC_LAUNCHED" not in os.environ:
    if "chdir" in sys.argv:
        os.chdir("/")
    sys.exit(run_ranks(current_command(), num_processes=2))
assert __name__ == "__main__"
os.write(1, f"{os.environ['RANK']} {sys.argv[1:]}\\n".encode())
"""


@pytest.mark.parametrize(
    "start",
    [["train.py"], ["folder"], ["-m", "train"], ["-m", "folder"], ["train.py", "chdir"]],
    ids=" ".join,
)
def test_a_running_program_can_be_started_again(tmp_path, start):
    for name in ("train.py", "folder/__main__.py"):
        write(tmp_path / name, AGAIN)
    job = python(*start, "a b", cwd=tmp_path)
    given = [argument for argument in start if argument == "chdir"] + ["a b"]
    assert (job.returncode, job.stderr) == (0, "")
    assert sorted(job.stdout.splitlines()) == [f"0 {given}", f"1 {given}"]


def test_an_interactive_session_cannot_be_started_again(tmp_path):
    job = python("-c", "from fabric_core.supervisor import current_command; current_command()", cwd=tmp_path)
    assert "LaunchError: The running program cannot be started again, because it is no script" in job.stderr


def test_the_path_of_the_script_is_kept_as_it_was_typed(tmp_path, monkeypatch):
    main = type(sys)("__main__")
    main.__file__ = str(write(tmp_path / "train.py", ""))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1"])
    assert current_command() == RankCommand("train.py", False, ("--lr", "1"))
    monkeypatch.setattr(sys, "argv", ["changed", "--lr", "1"])
    assert current_command() == RankCommand(main.__file__, False, ("--lr", "1"))
    del main.__file__
    with pytest.raises(LaunchError, match="no script"):
        current_command()


# ------------------------------------------------------------------------------------------ dying with the parent

CHILD = """
import sys, time
from fabric_core import orphans
{before}
orphans.die_with_parent({parent})
print("ready", flush=True)
time.sleep(60)
"""

MIDDLE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline().decode().strip(), flush=True)
time.sleep(60)
"""


def start_family(child: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    parent = subprocess.Popen([sys.executable, "-c", MIDDLE, child], stdout=subprocess.PIPE, text=True)
    with parent.stdout as out:
        pid, word = out.readline().split()
    assert word == "ready"
    return parent, psutil.Process(int(pid))


def wait_until_gone(process: psutil.Process, within: float = 30.0) -> None:
    """It would have slept for a minute."""
    started = time.monotonic()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - started < within
        time.sleep(0.01)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the parent-death signal of Linux")
def test_the_kernel_ends_even_a_stopped_child_of_a_killed_parent_at_once():
    parent, child = start_family(CHILD.format(before="", parent=""))
    child.suspend()
    parent.kill()
    parent.wait()
    wait_until_gone(child)


def test_without_help_from_the_kernel_a_thread_sees_that_the_parent_is_gone():
    parent, child = start_family(CHILD.format(before="orphans._ask_kernel = lambda: False", parent=""))
    parent.kill()
    parent.wait()
    wait_until_gone(child)


def test_a_grandparent_can_be_died_with_too():
    """A process between the two, such as a fork server, hides the parent from the kernel."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        parent, child = start_family(CHILD.format(before="", parent=other.pid))
        other.kill()
    wait_until_gone(child)
    parent.kill()
    parent.wait()


def test_a_parent_that_is_gone_before_the_call_is_noticed():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    child = subprocess.run([sys.executable, "-c", CHILD.format(before="", parent=gone.pid)], timeout=30)
    assert child.returncode == -signal.SIGKILL


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the dead from the living")
def test_a_parent_that_is_dead_but_not_yet_buried_counts_as_gone():
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    child = subprocess.run([sys.executable, "-c", CHILD.format(before="", parent=zombie.pid)], timeout=30)
    zombie.wait()
    assert child.returncode == -signal.SIGKILL
