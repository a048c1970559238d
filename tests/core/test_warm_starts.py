"""Ranks that are copies of one warm process: what they see, what they share, and what becomes of them when it dies.

The faults of ranks are tested in both ways of starting (test_supervisor.py). Here is what only copies can get wrong.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fabric_core.errors import ConfigurationError, LaunchError
from fabric_core.orphans import can_adopt
from fabric_core.specs import AcceleratorSpec, Inventory, StrategySpec
from fabric_core.starting import way_on, way_to_start
from fabric_core.supervisor import RankCommand, WarmStart, read_early, run_ranks

pytestmark = pytest.mark.skipif(not can_adopt(), reason="processes that adopt orphans, as Linux has them")

SUPERVISOR = """
import json, sys
from fabric_core.supervisor import RankCommand, WarmStart, run_ranks
script, processes, restarts, steps, required = json.loads(sys.argv[1])
warm = WarmStart(tuple(steps), required)
sys.exit(run_ranks(RankCommand(script), num_processes=processes, max_restarts=restarts, warm=warm, grace=30))
"""

PREAMBLE = """
import json, os, signal, sys, time
rank = int(os.environ["RANK"])
def answer(value):
    with open(f"answer-{rank}.part", "w") as file:
        json.dump(value, file)
    os.rename(f"answer-{rank}.part", f"answer-{rank}")
"""


class Job:
    """A supervisor in a folder of its own, whose ranks are copies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def start(
        self,
        source: str,
        *steps: str,
        processes: int = 2,
        restarts: int = 0,
        required: bool = True,
        flags: tuple[str, ...] = (),
        **env: str,
    ) -> Job:
        (self.folder / "train.py").write_text(PREAMBLE + textwrap.dedent(source))
        asked = json.dumps(["train.py", processes, restarts, steps, required])
        self.process = subprocess.Popen(
            [sys.executable, *flags, "-c", SUPERVISOR, asked],
            cwd=self.folder,
            env={**os.environ, "TMPDIR": str(self.folder), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def end(self, within: float = 60) -> tuple[int, str]:
        """Exit code and standard error; nothing of the job is left, not even dead."""
        family = self.family()
        _, err = self.process.communicate(timeout=within)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
        assert not list(self.folder.glob("fabric-*"))
        return self.process.returncode, err

    def answers(self, source: str, *steps: str, **options: Any) -> list[Any]:
        """What the ranks of a job that succeeds answer."""
        code, err = self.start(source, *steps, **options).end()
        assert (code, err) == (0, "")
        return [
            json.loads((self.folder / f"answer-{rank}").read_text())
            for rank in range(options.get("processes", 2))
        ]

    def family(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def wait_for(self, *names: str) -> None:
        until = time.monotonic() + 60
        while not all((self.folder / name).exists() for name in names):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < until, f"still missing: {names}"
            time.sleep(0.005)

    def pid(self, name: str) -> int:
        self.wait_for(name)
        return int((self.folder / name).read_text())


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        for process in made.family():
            process.kill()
        made.process.kill()
        made.process.communicate()


def write_module(folder: Path, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(source))


# -- what a copy is ----------------------------------------------------------------------------------------------------


def test_ranks_are_children_of_the_supervisor_and_the_warm_process_is_gone_once_they_are_there(
    job: Job,
) -> None:
    source = "answer([os.getpid(), os.getppid()])\nwhile not os.path.exists('go'): time.sleep(0.01)"
    job.start(source)
    job.wait_for("answer-0", "answer-1")
    until = time.monotonic() + 30
    while len(job.family()) > 2 and time.monotonic() < until:
        time.sleep(0.01)
    family = {process.pid: process.ppid() for process in job.family()}
    (job.folder / "go").touch()
    assert job.end() == (0, "")
    ranks = [json.loads((job.folder / f"answer-{rank}").read_text()) for rank in range(2)]
    assert family == dict(ranks)
    assert set(family.values()) == {job.process.pid}


ALIKE = """
import threading
flags = {name: getattr(sys.flags, name) for name in ("optimize", "dev_mode", "utf8_mode", "hash_randomization")}
answer({
    "environ": {name: value for name, value in os.environ.items() if name not in VARYING},
    "descriptors": len(os.listdir("/proc/self/fd")),
    "signals": [str(signal.getsignal(s)).split(" at ")[0] for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "threads": [threading.active_count(), threading.current_thread() is threading.main_thread()],
    "group": os.getpgrp(),
    "flags": flags,
    "cwd": os.getcwd(),
    "orig_argv": sys.orig_argv,
    "stdin": os.path.realpath("/proc/self/fd/0") == os.devnull,
})
"""
VARYING = ["MASTER_PORT", "FABRIC_MEETING_PORT", "FABRIC_ERROR_DIR", "FABRIC_LISTEN_FD"]


def test_a_copy_finds_what_a_fresh_process_finds(tmp_path: Path) -> None:
    """Both are started by the same parent here, in one group of processes."""
    program = """
import os, sys
from fabric_core.supervisor import RankCommand, WarmStart, run_ranks
for warm in (None, WarmStart(required=True)):
    run_ranks(RankCommand("train.py", args=("a b", "c")), num_processes=2, warm=warm)
    for rank in range(2):
        os.rename(f"answer-{rank}", f"answer-{rank}-{'fresh' if warm is None else 'warm'}")
"""
    (tmp_path / "train.py").write_text(f"{PREAMBLE}\nVARYING = {VARYING}\n{ALIKE}")
    flags = ("-O", "-X", "dev", "-X", "utf8", "-W", "error")
    ended = subprocess.run(
        [sys.executable, *flags, "-c", program],
        cwd=tmp_path,
        input="",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    for rank in range(2):
        fresh, warm = (
            json.loads((tmp_path / f"answer-{rank}-{way}").read_text()) for way in ("fresh", "warm")
        )
        assert warm == fresh
        assert fresh["environ"]["RANK"] == str(rank)


def test_modules_are_imported_once_and_those_beside_the_script_hide_others_as_ever(job: Job) -> None:
    write_module(job.folder, "slow", "import os\nopen(f'imported-by-{os.getpid()}', 'w').close()")
    ranks = job.answers("import slow\nanswer([sys.modules['slow'].__file__, sys.path[0]])", "slow")
    assert ranks == [[str(job.folder / "slow.py"), str(job.folder)]] * 2
    assert len(list(job.folder.glob("imported-by-*"))) == 1


def test_ranks_draw_different_random_numbers_as_fresh_ones_do(job: Job) -> None:
    source = """
    import random, tempfile, uuid
    import numpy, torch
    names = tempfile._get_candidate_names()
    answer([random.random(), numpy.random.random(), next(names), str(uuid.uuid4()), torch.rand(1).item()])
    """
    zero, one = job.answers(source, "torch", "random:random", "numpy.random", "tempfile:_get_candidate_names")
    assert not [number for number in zero if number in one]


def test_threads_compute_in_copies_and_loaders_have_workers_of_every_kind(job: Job) -> None:
    """Also after the libraries that the warm process has imported could have started threads.

    What workers send back is an object of a class of the script: of ``__mp_main__`` to those that were not forked.
    """
    source = """
    import multiprocessing
    import numpy, torch
    from torch.utils.data import DataLoader, Dataset

    class Squares(Dataset):
        def __len__(self):
            return 8
        def __getitem__(self, index):
            return index ** 2

    class Batch:
        def __init__(self, numbers):
            self.numbers = torch.tensor(numbers)

    if __name__ == "__main__":
        torch.set_num_threads(2)
        left = torch.ones(600, 600)
        product = (left @ left).sum().item(), float((left.numpy() @ left.numpy()).sum())
        threads = len(os.listdir("/proc/self/task"))
        sums = []
        for method in ("fork", "spawn", "forkserver"):
            loader = DataLoader(Squares(), 4, num_workers=1, collate_fn=Batch, multiprocessing_context=method)
            sums.append(sum(batch.numbers.sum().item() for batch in loader))
        answer([product, threads > 1, sums])
    """
    (rank,) = job.answers(source, "torch", processes=1, OMP_NUM_THREADS="2", OPENBLAS_NUM_THREADS="2")
    assert rank == [[600.0**3, 600.0**3], True, [140, 140, 140]]


def test_what_runs_last_runs_once_per_rank_and_not_in_the_warm_process(job: Job) -> None:
    write_module(
        job.folder,
        "registers",
        """
        import atexit, os
        atexit.register(lambda: open(f"last-{os.environ.get('RANK')}-{os.getpid()}", "w").close())
        """,
    )
    job.answers("answer(None)", "registers")
    assert sorted(path.name.rpartition("-")[0] for path in job.folder.glob("last-*")) == ["last-0", "last-1"]


# -- when nothing can be copied ----------------------------------------------------------------------------------------

THREADED = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
DEVICE = """
class accelerator:
    @staticmethod
    def current_accelerator():
        return type("device", (), {"type": "toaster"})
def get_device_module(device):
    return type("module", (), {"is_initialized": staticmethod(lambda: True)})
"""
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
HAZARDS = {
    "threaded": (THREADED, "1 more thread(s) run after the imports"),
    "torch": (DEVICE, "the device 'toaster' is in use after the imports"),
    "broken": ("1 / 0", "broken fails: ZeroDivisionError: division by zero"),
    "exits": ("raise SystemExit(3)", "exits fails: SystemExit: 3"),
    "dies": (
        KILLED,
        "the process to be copied has ended: killed by SIGKILL (the system may have run out of memory: see dmesg)",
    ),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_where_copies_would_not_work_ranks_are_started_afresh_and_the_user_hears_why(
    job: Job, name: str
) -> None:
    source, why = HAZARDS[name]
    write_module(job.folder, name, source)
    copied = f"answer({name!r} in sys.modules)"
    assert job.start(copied, name, required=False).end() == (
        0,
        f"fabric: the ranks are started afresh, not copied: {why}\n",
    )
    assert [(job.folder / f"answer-{rank}").read_text() for rank in range(2)] == ["false", "false"]


def test_whoever_insists_on_copies_gets_an_error_before_any_rank_runs(job: Job) -> None:
    write_module(job.folder, "threaded", THREADED)
    code, err = job.start("answer(None)", "threaded").end()
    assert code == 1
    assert "LaunchError: The ranks cannot be copied from a warm process: 1 more thread(s) run" in err
    assert not list(job.folder.glob("answer-*"))


@pytest.mark.parametrize(
    ("line", "variable"),
    [
        ('os.environ["OMP_NUM_THREADS"] = "1"', "OMP_NUM_THREADS"),
        ("os.environ.setdefault('MKL_NUM_THREADS', '1')", "MKL_NUM_THREADS"),
        ('os.environ["PYTORCH_JIT"] = "0"', "PYTORCH_JIT"),
        ('os.environ.update(KMP_BLOCKTIME="1", OMP_NUM_THREADS=str(1))', "KMP_BLOCKTIME"),
        ('os.environ["FABRIC_PLUGINS_DENY"] = "acme"', "FABRIC_PLUGINS_DENY"),
        ('os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"', None),
        ("OMP_NUM_THREADS = 1", None),
    ],
)
def test_a_program_that_may_set_what_imports_read_is_not_copied(
    job: Job, line: str, variable: str | None
) -> None:
    assert read_early(line.encode()) == variable
    ended = job.start(f"{line}\nanswer('fractions' in sys.modules)", "fractions", required=False).end()
    assert ended == (0, "")
    assert json.loads((job.folder / "answer-0").read_text()) == (variable is None)


def test_the_text_of_a_program_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("package/__init__", "package/module", "package/__main__", "script"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise RuntimeError({name!r})")
    with zipfile.ZipFile("archive.pyz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__main__.py", "raise RuntimeError('archive')")
    texts = {
        RankCommand("archive.pyz"): b"'archive'",
        RankCommand("script.py"): b"'script'",
        RankCommand("package"): b"'package/__main__'",
        RankCommand("package", is_module=True): b"'package/__main__'",
        RankCommand("package.module", is_module=True): b"'package/module'",
    }
    for command, text in texts.items():
        assert text in command.source()
    assert RankCommand("package.nowhere", is_module=True).source() == b""
    assert "package" not in sys.modules


# -- deaths ------------------------------------------------------------------------------------------------------------

SLOW = """
import os, time
with open("warming.part", "w") as file:
    file.write(str(os.getpid()))
os.rename("warming.part", "warming")
time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_all", [True, False], ids=["to the group", "to the supervisor"])
def test_a_signal_while_the_imports_run_ends_the_job_at_once(
    job: Job, signum: signal.Signals, to_all: bool
) -> None:
    write_module(job.folder, "slow", SLOW)
    job.start("answer(None)", "slow")
    job.pid("warming")
    (os.killpg if to_all else os.kill)(job.process.pid, signum)
    ended = "interrupted" if signum == signal.SIGINT else "ended by SIGTERM"
    assert job.end(within=20) == (128 + signum, f"fabric: {ended}\n")
    assert not list(job.folder.glob("answer-*"))


def test_an_announcement_while_the_imports_run_reaches_the_ranks(job: Job) -> None:
    write_module(
        job.folder, "slow", SLOW.replace("time.sleep(60)", "while not os.path.exists('go'): time.sleep(0.01)")
    )
    job.start("time.sleep(60)", "slow")
    job.pid("warming")
    os.kill(job.process.pid, signal.SIGUSR1)
    time.sleep(0.2)
    (job.folder / "go").touch()
    code, err = job.end()
    assert code == 128 + signal.SIGUSR1
    assert err.splitlines()[-1].endswith("killed by SIGUSR1")


def test_kill_9_of_the_supervisor_while_the_imports_run_leaves_nothing(job: Job) -> None:
    write_module(job.folder, "slow", SLOW)
    job.start("answer(None)", "slow")
    warm = psutil.Process(job.pid("warming"))
    warm.suspend()
    job.process.kill()
    job.process.communicate()
    psutil.wait_procs([warm], timeout=20)
    assert not warm.is_running() or warm.status() == psutil.STATUS_ZOMBIE


def test_kill_9_of_the_warm_process_while_the_imports_run_is_told(job: Job) -> None:
    write_module(job.folder, "slow", SLOW)
    job.start("answer(None)", "slow")
    os.kill(job.pid("warming"), signal.SIGKILL)
    code, err = job.end()
    assert code == 1
    assert (
        "The ranks cannot be copied from a warm process: the process to be copied has ended: killed by SIGKILL"
        in err
    )


def test_kill_9_of_the_warm_process_between_two_ranks_ends_the_job_with_a_clear_message(job: Job) -> None:
    program = """
import os, signal, sys, time
from fabric_core.supervisor import RankCommand, WarmStart, run_ranks, starters
start = starters.WarmStarter.start
def start_and_kill(self, environ, **options):
    if environ["RANK"] == "1":
        self._process.kill()
        self._process.wait()
    return start(self, environ, **options)
starters.WarmStarter.start = start_and_kill
run_ranks(RankCommand("train.py"), num_processes=2, warm=WarmStart())
"""
    (job.folder / "train.py").write_text("import time; time.sleep(60)")
    job.process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=job.folder,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    code, err = job.end(within=30)
    assert code == 1
    assert (
        "Rank 1 could not be started as a copy of the warm process: the process to be copied has ended: killed"
        in err
    )


TELLING = """
import os, time
with open("pid.part", "w") as file:
    file.write(str(os.getpid()))
os.rename("pid.part", "pid")
time.sleep(60)
"""


def wait_until_gone(pid: int) -> None:
    until = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "it would sleep for a minute"
        time.sleep(0.02)


def test_a_system_that_gives_the_copies_to_another_process_is_noticed(job: Job) -> None:
    """Their ends could not be seen. They end with the supervisor nevertheless."""
    program = """
import contextlib
from fabric_core.supervisor import RankCommand, WarmStart, run_ranks, starters
starters.adopting = contextlib.nullcontext
run_ranks(RankCommand("train.py"), num_processes=2, warm=WarmStart())
"""
    (job.folder / "train.py").write_text(TELLING)
    job.process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=job.folder,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    code, err = job.end()
    assert code == 1
    assert (
        "Rank 0 could not be started as a copy of the warm process: the copy has become the child of another"
        in err
    )
    if (job.folder / "pid").exists():
        wait_until_gone(int((job.folder / "pid").read_text()))


def test_what_imports_change_in_the_environment_and_on_the_path_stays_changed(job: Job) -> None:
    source = """
    import os, sys
    os.environ["ADDED"] = "yes"
    del os.environ["REMOVED"]
    sys.path.append("/appended")
    """
    write_module(job.folder, "changes", source)
    looks = "answer([os.environ.get('ADDED'), os.environ.get('REMOVED'), os.environ['RANK'], sys.path[-1]])"
    zero, one = job.answers(looks, "changes", REMOVED="there")
    assert (zero, one) == (["yes", None, "0", "/appended"], ["yes", None, "1", "/appended"])


def test_ranks_are_copied_again_from_the_same_process_and_from_another_if_that_is_gone(job: Job) -> None:
    """The first restart finds the warm process of the start, the second finds it dead."""
    write_module(job.folder, "slow", "import os\nopen(f'imported-by-{os.getpid()}', 'w').close()")
    source = """
    from fabric_core.supervisor import Milestone, tell_supervisor
    tell_supervisor(Milestone.JOINED)
    attempt = int(os.environ["FABRIC_RESTARTS"])
    warm = [int(name.rpartition("-")[2]) for name in os.listdir() if name.startswith("imported-by-")]
    answer([attempt, len(warm)])
    open(f"here-{attempt}-{rank}", "w").close()
    while not os.path.exists(f"here-{attempt}-1"):
        time.sleep(0.01)
    if rank == 0 and attempt < 3:
        if attempt == 1:
            os.kill(warm[0], signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    code, err = job.start(source, "slow", restarts=3).end()
    assert code == 0, err
    assert json.loads((job.folder / "answer-0").read_text()) == [3, 2]


# -- the decision ------------------------------------------------------------------------------------------------------


def accelerator(**options: Any) -> AcceleratorSpec:
    return AcceleratorSpec("toaster", "kitchen:Toaster", probe=lambda: Inventory((0, 1)), **options)


def test_ranks_are_copied_only_where_the_accelerator_says_that_they_may_be() -> None:
    assert way_on(accelerator(), {}).name == "fresh"
    assert "'toaster' does not say" in way_on(accelerator(), {}).reason
    assert way_on(accelerator(forkable=True), {}).name == "warm"
    with pytest.raises(ConfigurationError, match="forkable='yes'"):
        accelerator(forkable="yes")


def test_the_user_decides_on_the_command_line_or_in_a_variable() -> None:
    forkable = accelerator(forkable=True)
    assert way_on(forkable, {"FABRIC_START": "fresh"}).reason == "FABRIC_START=fresh asks for it"
    assert way_on(forkable, {"FABRIC_START": "fresh"}, "warm").reason == "--start=warm asks for it"
    assert way_on(accelerator(), {"FABRIC_START": "Warm"}).warm.required
    assert way_on(accelerator(), {"FABRIC_START": ""}).name == "fresh"
    with pytest.raises(ConfigurationError, match="--start is 'wram'.* Did you mean 'warm'"):
        way_on(forkable, {}, "wram")


def test_other_systems_start_their_ranks_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fabric_core.starting.can_adopt", lambda: False)
    assert way_on(accelerator(forkable=True), {}).name == "fresh"
    with pytest.raises(ConfigurationError, match="That takes Linux"):
        way_on(accelerator(), {}, "warm")


def test_a_plan_says_what_is_imported_once(shelf: Any) -> None:
    shelf.put("kitchen", StrategySpec("pair", "kitchen.strategies:Pair", supports=("*",)))
    warm = way_to_start(shelf.plan(devices=2, accelerator="cpu", strategy="pair"), {}).warm
    assert warm.steps[:3] == ("torch", "fabric_core.fabric", "fabric_core.registry:default_registry")
    assert {"fabric_core.parts.cpu", "kitchen.strategies"} <= set(warm.steps)
    alone = shelf.plan(devices=1, accelerator="cpu")
    assert way_to_start(alone, {}).name == "fresh"
    assert way_to_start(alone, {"FABRIC_START": "warm"}).name == "warm"


def test_a_missing_script_is_told_as_ever() -> None:
    with pytest.raises(LaunchError, match="no script"):
        run_ranks(RankCommand("nowhere.py"), num_processes=2, warm=WarmStart())
