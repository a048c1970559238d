"""The supervisor, shown with real processes: who fails, what the user sees, how fast all are gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fabric_core.errors import LaunchError, RankFailedError
from fabric_core.supervisor import (
    Failure,
    Outcome,
    RankCommand,
    WarmStart,
    error_directory,
    listening_socket,
    mark_failure,
    raise_for_outcome,
    rank_variables,
    report,
    run_ranks,
    supervise,
    watch,
)
from fabric_core.supervisor.failures import crash_path, failed_at, write_failure

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")

SUPERVISOR = """
import os, sys
from fabric_core.supervisor import RankCommand, WarmStart, run_ranks
warm = WarmStart(required=True) if os.environ["WAY"] == "warm" else None
sys.exit(run_ranks(RankCommand(sys.argv[2]), num_processes=int(sys.argv[1]), warm=warm))
"""

# What every rank's script begins with.
PREAMBLE = """
import os, signal, socket, sys, threading, time
rank = int(os.environ["RANK"])
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one piece, however the ranks interleave
def ready():
    with open(f"pid-{rank}.part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"pid-{rank}.part", f"pid-{rank}")
def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.01)
"""

SLEEPING = "ready()\ntime.sleep(60)\n"


class Job:
    """A supervisor in a process group of its own, and its ranks, all marked by an environment variable."""

    def __init__(self, folder: Path, num_processes: int, source: str, program: str, **env: str) -> None:
        self.folder, self.num_processes, self.token = folder, num_processes, uuid.uuid4().hex
        script = folder / "train.py"
        script.write_text(PREAMBLE + textwrap.dedent(source))
        with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, str(num_processes), str(script)],
                cwd=folder,
                env={**os.environ, "JOB_TOKEN": self.token, "TMPDIR": str(folder), **env},
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def pids(self) -> list[int]:
        """The ranks, once all of them have called ``ready()``."""
        files = [self.folder / f"pid-{rank}" for rank in range(self.num_processes)]
        wait_until(lambda: all(file.exists() for file in files) or self.process.poll() is not None)
        return [int(file.read_text()) for file in files]

    def living(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("JOB_TOKEN") == self.token and process.status() != "zombie":
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def finish(self, within: float = 30.0) -> int:
        """Wait for the end; nothing of the job may be left."""
        code = self.process.wait(within)
        wait_until(lambda: not self.living())  # the helper of multiprocessing takes a moment
        assert list(self.folder.glob("fabric-*")) == [], "the directory of records is removed"
        return code

    def kill(self) -> None:
        for process in [*self.living(), self.process]:
            process.kill()
        self.process.wait()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()


def wait_until(condition: Callable[[], bool], within: float = 30.0) -> float:
    """Seconds until ``condition`` held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < within
        time.sleep(0.005)
    return time.monotonic() - started


@pytest.fixture
def way(request: pytest.FixtureRequest) -> str:
    """How the ranks are started; both ways where `both_ways` marks a test."""
    return getattr(request, "param", "fresh")


both_ways = pytest.mark.parametrize("way", ["fresh", "warm"], indirect=True)


@pytest.fixture
def start(tmp_path: Path, way: str) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start_job(num_processes: int, source: str, program: str = SUPERVISOR, **env: str) -> Job:
        # Longer than a test waits, so that nothing ends because of it.
        own = {"FABRIC_GRACE_SECONDS": "60", "WAY": way}
        jobs.append(Job(tmp_path, num_processes, source, program, **{**own, **env}))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.kill()


# ------------------------------------------------------------------------------------------ a rank fails

RAISING = """
def train():
    if rank == {failing}:
        wait_for("go")
        raise ValueError(f"boom on rank {{rank}}")
    time.sleep(60)
ready()
train()
"""


@both_ways
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_the_traceback_of_the_rank_that_raised_is_what_the_user_sees_last(start, failing):
    job = start(3, RAISING.format(failing=failing))
    job.pids()
    (job.folder / "go").touch()
    assert job.finish() == 1
    # What the interpreter itself writes about the same script is the reference.
    plain = subprocess.run(
        [sys.executable, str(job.folder / "train.py")],
        cwd=job.folder,
        env={**os.environ, "RANK": str(failing)},
        capture_output=True,
        text=True,
    )
    assert f"boom on rank {failing}" in plain.stderr
    assert job.err == f"fabric: rank {failing} failed: ValueError: boom on rank {failing}\n{plain.stderr}"


def test_a_single_rank_shows_its_traceback_once(start):
    job = start(1, RAISING.format(failing=0))
    (job.folder / "go").touch()
    assert job.finish() == 1
    assert job.err.startswith("Traceback (most recent call last)")
    assert job.err.count("boom on rank 0") == 1


CONNECTED = """
def connect():
    if rank == 0:
        server = socket.create_server(("127.0.0.1", 0))
        with open("port.part", "w") as file:
            file.write(str(server.getsockname()[1]))
        os.rename("port.part", "port")
        return server.accept()[0]
    wait_for("port")
    return socket.create_connection(("127.0.0.1", int(open("port").read())))
peer = connect()
"""


@both_ways
@pytest.mark.parametrize("culprit", [0, 1])
def test_the_cause_is_told_apart_from_its_consequence_even_when_it_takes_longer_to_die(start, culprit):
    job = start(
        2,
        CONNECTED
        + f"""
import atexit
def linger():
    peer.close()
    time.sleep(0.5)
atexit.register(linger)
if rank == {culprit}:
    raise ValueError("the cause")
if not peer.recv(1):
    raise RuntimeError("connection closed by peer\\nwith many\\nmore lines")
""",
    )
    assert job.finish() == 1
    first, second, *traceback = job.err.splitlines()
    assert first == f"fabric: rank {1 - culprit} then failed: RuntimeError: connection closed by peer"
    assert second == f"fabric: rank {culprit} failed first: ValueError: the cause"
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-1] == "ValueError: the cause"


def test_a_failure_that_was_marked_before_the_tear_down_stays_the_first(start):
    job = start(
        2,
        CONNECTED
        + """
from fabric_core.supervisor import mark_failure
if rank == 1:
    try:
        raise ValueError("the cause")
    except ValueError as error:
        mark_failure(error)
        peer.close()
        time.sleep(0.1)
        raise
peer.recv(1)
raise RuntimeError("connection closed by peer")
""",
    )
    assert job.finish() == 1
    assert job.err.endswith("ValueError: the cause\n")


@both_ways
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_and_the_exit_code_names_the_signal(start, victim):
    job = start(2, SLEEPING)
    os.kill(job.pids()[victim], signal.SIGKILL)
    assert job.finish() == 128 + signal.SIGKILL
    assert job.err.startswith(f"fabric: rank {victim} failed: killed by SIGKILL")
    assert len(job.err.splitlines()) == 1


@both_ways
def test_a_crash_of_the_interpreter_shows_its_stacks(start):
    job = start(2, "if rank == 1:\n    import faulthandler\n    faulthandler._sigsegv()\ntime.sleep(60)")
    assert job.finish() == 128 + signal.SIGSEGV
    assert "fabric: rank 1 failed: killed by SIGSEGV\n" in job.err
    assert "Fatal Python error: Segmentation fault" in job.err
    assert "train.py" in job.err


@both_ways
@pytest.mark.parametrize(
    ("ending", "code", "tail"),
    [
        ("sys.exit(3)", 3, "exited with code 3\n"),
        ("sys.exit(-1)", 255, "exited with code 255\n"),
        ("sys.exit('no such file')", 1, "exited with code 1\nno such file\n"),
        ("os._exit(4)", 4, "exited with code 4\n"),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, "exited with code 130\n"),
    ],
)
def test_an_exit_code_of_a_rank_is_the_exit_code_of_the_job(start, ending, code, tail):
    job = start(2, f"if rank == 1:\n    {ending}\ntime.sleep(60)")
    assert job.finish() == code
    assert job.err == f"fabric: rank 1 failed: {tail}"


@pytest.mark.parametrize(
    ("ending", "code", "err"), [("sys.exit(3)", 3, ""), ("sys.exit('no such file')", 1, "no such file\n")]
)
def test_a_single_rank_exits_as_a_plain_script_does(start, ending, code, err):
    job = start(1, ending)
    assert job.finish() == code
    assert job.err == err


@pytest.mark.parametrize("ending", ["", "sys.exit()", "sys.exit(0)", "sys.exit(256)"])
def test_success_is_silent_and_a_rank_that_is_done_early_ends_nobody(start, ending):
    job = start(2, f"time.sleep(0.2 * rank)\nsay('done')\n{ending}")
    assert job.finish() == 0
    assert job.out.split() == ["done", "done"]
    assert job.err == ""


@pytest.mark.parametrize(
    "source", ["while True: print('x' * 999)", "print('y')"], ids=["at once", "at its end"]
)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_whose_output_nobody_reads_ends_without_a_traceback(tmp_path, processes, source):
    (tmp_path / "train.py").write_text(source)
    reading, writing = os.pipe()
    os.close(reading)
    job = subprocess.run(
        [sys.executable, "-c", SUPERVISOR, str(processes), "train.py"],
        cwd=tmp_path,
        env={**os.environ, "WAY": "fresh"},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writing)
    assert job.returncode == 128 + signal.SIGPIPE
    lines = job.stderr.splitlines()
    assert 0 < len(lines) <= processes
    assert all(line.startswith("fabric: rank ") for line in lines)
    assert all(line.endswith("nobody reads its output any more") for line in lines)


def test_a_rank_that_failed_but_cannot_end_does_not_hold_up_the_job(start):
    source = """
    if rank == 1:
        threading.Thread(target=time.sleep, args=(60,)).start()
        raise ValueError("boom")
    time.sleep(60)
    """
    job = start(2, source, FABRIC_GRACE_SECONDS="0.3")
    assert job.finish() == 1
    assert job.err.endswith("ValueError: boom\n")


@both_ways
def test_a_rank_that_failed_may_finish_what_it_does_last(start):
    """It is noticed as failed long before it ends, and the others are ended, but not this one."""
    source = """
    import atexit
    if rank == 1:
        wait_for("pid-0")
        atexit.register(lambda: [time.sleep(1.2), say("finished")])
        raise ValueError("boom")
    signal.signal(signal.SIGTERM, lambda *_: [say("told to end"), sys.exit()])
    ready()
    time.sleep(60)
    """
    job = start(2, source)
    assert job.finish() == 1
    assert job.out.splitlines() == ["told to end", "finished"]


@both_ways
def test_a_stopped_rank_is_killed_after_the_grace_period(start):
    job = start(2, RAISING.format(failing=1), FABRIC_GRACE_SECONDS="0.5")
    os.kill(job.pids()[0], signal.SIGSTOP)
    (job.folder / "go").touch()
    assert job.finish() == 1


def test_a_rank_may_use_the_grace_period_but_not_more(start):
    source = """
    def clean_up(signum, frame):
        say("cleaned up", rank)
        if rank == 0:
            sys.exit(0)
    signal.signal(signal.SIGTERM, clean_up)
    ready()
    if rank == 2:
        wait_for("pid-0")
        wait_for("pid-1")
        raise ValueError("boom")
    while True:
        time.sleep(60)
    """
    job = start(3, source, FABRIC_GRACE_SECONDS="0.7")
    job.pids()
    started = time.monotonic()
    assert job.finish() == 1
    assert time.monotonic() - started >= 0.4
    assert sorted(job.out.splitlines()) == ["cleaned up 0", "cleaned up 1"]
    assert job.err.endswith("ValueError: boom\n")


@both_ways
def test_exit_codes_survive_a_parent_that_ignores_its_children(start):
    """A process that ignores SIGCHLD never learns how its children ended; the failure would look like success."""
    job = start(
        2,
        "if rank == 1: os._exit(5)\ntime.sleep(60)",
        program=f"import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n{SUPERVISOR}",
    )
    assert job.finish() == 5


# ------------------------------------------------------------------------------------------- the parent dies


@both_ways
def test_kill_9_of_the_parent_leaves_no_rank_and_no_worker_alive(start):
    source = """
    import subprocess
    worker = "import time; from fabric_core.orphans import die_with_parent; die_with_parent(); print('up', flush=True)"
    child = subprocess.Popen([sys.executable, "-c", f"{worker}; time.sleep(60)"], stdout=subprocess.PIPE)
    child.stdout.readline()
    ready()
    time.sleep(60)
    """
    job = start(2, source)
    os.kill(job.pids()[1], signal.SIGSTOP)
    assert len(job.living()) == 5
    job.process.kill()
    wait_until(lambda: not job.living())


# -------------------------------------------------------------------------------------------------- signals

STUBBORN = """
if rank == 1:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
"""

CLEANING = """
try:
    ready()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)
    say("cleaned up")
    raise
"""


@both_ways
@pytest.mark.parametrize("stubborn", ["", STUBBORN], ids=["docile", "stubborn"])
@pytest.mark.parametrize("to_all", [True, False], ids=["to_the_group", "to_the_supervisor"])
def test_ctrl_c_ends_everything_after_a_short_grace_period_without_a_traceback(start, to_all, stubborn):
    job = start(2, stubborn + CLEANING)
    job.pids()
    (os.killpg if to_all else os.kill)(job.process.pid, signal.SIGINT)
    assert job.finish() == 130
    assert job.err == "fabric: interrupted\n"
    assert job.out.splitlines() == ["cleaned up"] * (1 if stubborn else 2), "each rank cleans up undisturbed"


START_TELLS = """
from fabric_core.supervisor import starters
popen = starters.subprocess.Popen
def tell(*arguments, **options):
    open("starting", "w").close()
    return popen(*arguments, **options)
starters.subprocess.Popen = tell
"""


@both_ways
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.04, 0.07, 0.1])
def test_ctrl_c_while_the_ranks_are_starting_shows_no_traceback_either(start, delay):
    program = SUPERVISOR.replace("sys.exit(", f"{START_TELLS}\nsys.exit(")
    job = start(3, SLEEPING, program=program)
    wait_until((job.folder / "starting").exists)
    time.sleep(delay)
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.finish() == 130
    assert job.err == "fabric: interrupted\n"


@both_ways
def test_a_second_ctrl_c_kills_at_once(start):
    patient = "from fabric_core.supervisor import watch\nwatch._INTERRUPT_GRACE = 60.0\n"
    job = start(2, STUBBORN + SLEEPING, program=SUPERVISOR.replace("sys.exit(", f"{patient}sys.exit("))
    job.pids()
    os.killpg(job.process.pid, signal.SIGINT)
    time.sleep(0.4)
    assert job.process.poll() is None
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.finish() == 130
    assert job.err == "fabric: interrupted\n"


def test_ctrl_c_cuts_the_grace_period_after_a_failure_short(start):
    job = start(2, STUBBORN + RAISING.format(failing=0))
    job.pids()
    (job.folder / "go").touch()
    time.sleep(0.5)
    assert job.process.poll() is None
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.finish() == 1
    assert job.err.endswith("ValueError: boom on rank 0\n")


@both_ways
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_the_supervisor_is_passed_on(start, name):
    source = f"""
    def note(signum, frame):
        say("got", signum)
        if rank == 0:
            sys.exit(0)
    signal.signal(signal.{name}, note)
    ready()
    while True:
        time.sleep(60)
    """
    job = start(2, source, FABRIC_GRACE_SECONDS="0.5")
    job.pids()
    os.kill(job.process.pid, signal.Signals[name])
    assert job.finish() == 128 + signal.Signals[name]
    assert job.out.splitlines() == [f"got {signal.Signals[name]}"] * 2
    late = "1 rank(s) did not end within the grace period and were killed"
    assert job.err == f"fabric: ended by {name}; {late}\n"


@both_ways
def test_a_job_that_was_started_under_nohup_outlives_the_terminal(start):
    job = start(
        1, SLEEPING, program=f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{SUPERVISOR}"
    )
    job.pids()
    os.killpg(job.process.pid, signal.SIGHUP)
    time.sleep(0.2)
    assert len(job.living()) == 2
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.finish() == 143


# ------------------------------------------------------------------------------------ network and environment


@both_ways
def test_only_rank_0_listens_and_only_on_loopback_while_the_others_reach_it(start):
    source = """
    if rank == 0:
        with socket.socket(fileno=int(os.environ["FABRIC_LISTEN_FD"])) as server:
            assert server.getsockname() == (os.environ["MASTER_ADDR"], int(os.environ["FABRIC_MEETING_PORT"]))
            assert not os.get_inheritable(server.fileno())
            server.accept()[0].sendall(b"hello")
            ready()
            wait_for("go")
    else:
        assert "FABRIC_LISTEN_FD" not in os.environ
        peer = socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["FABRIC_MEETING_PORT"])))
        say(peer.recv(5).decode())
        ready()
        wait_for("go")
    """
    job = start(2, source)
    ranks = job.pids()
    listening = {
        process.pid: connection.laddr.ip
        for process in job.living()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {ranks[0]: "127.0.0.1"}
    (job.folder / "go").touch()
    assert job.finish() == 0
    assert job.out == "hello\n"


def test_a_free_port_is_kept_for_programs_that_listen_by_themselves(start):
    source = """
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    assert place[1] != int(os.environ["FABRIC_MEETING_PORT"])
    with socket.socket() as stranger:
        try:
            stranger.bind(place)
            say("not kept")
        except OSError:
            pass
    if rank == 0:
        with socket.create_server(place) as server:
            server.accept()[0].sendall(b"hello")
    else:
        while True:
            try:
                say(socket.create_connection(place).recv(5).decode())
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
    """
    job = start(2, source)
    assert job.finish() == 0
    assert job.out == "hello\n"


def test_a_port_that_is_taken_is_one_clear_error_before_any_process_is_started(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("open('started', 'w')")
    earlier = psutil.Process().children()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            LaunchError, match=rf"127\.0\.0\.1 port {port}: it is already in use.*--main-port"
        ):
            run_ranks(RankCommand(str(script)), num_processes=2, main_port=port)
    assert psutil.Process().children() == earlier
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_processes": 0}, "0 processes"),
        ({"num_processes": 1, "num_nodes": 2, "node_rank": 2}, "node rank is 2"),
        ({"num_processes": 1, "main_address": "192.0.2.1"}, "does not belong to this machine"),
        ({"num_processes": 1, "main_address": "no.such.host.invalid"}, "cannot be resolved"),
        ({"num_processes": 1, "main_port": 70000}, "from 1 to 65535"),
        ({"num_processes": 1, "grace": -1.0}, "FABRIC_GRACE_SECONDS"),
    ],
)
def test_numbers_and_addresses_that_make_no_sense_are_refused(tmp_path, options, complaint):
    script = tmp_path / "train.py"
    script.touch()
    with pytest.raises(LaunchError, match=complaint):
        run_ranks(RankCommand(str(script)), **options)


def test_a_script_that_is_not_there_is_refused():
    with pytest.raises(LaunchError, match=r"no script 'nowhere\.py'"):
        run_ranks(RankCommand("nowhere.py"), num_processes=2)


def test_a_socket_is_opened_only_where_the_address_is_ours():
    with listening_socket("127.0.0.1") as free:
        address, port = free.getsockname()
        assert address == "127.0.0.1"
        assert port > 0
        with socket.create_connection((address, port)):
            free.accept()[0].close()  # the side that closes first keeps the port for a minute
    assert listening_socket("192.0.2.1", 29500) is None
    with listening_socket("localhost", port) as again:
        assert again.getsockname()[1] == port, "a port is free again at once"


def test_two_nodes_on_one_machine_share_the_ranks(start, tmp_path):
    """Two supervisors; a script tells what each rank was told. The second node opens nothing."""
    two = """
import sys, subprocess
from fabric_core.supervisor import RankCommand, listening_socket, run_ranks
with listening_socket() as probe:
    port = probe.getsockname()[1]
node = "import sys; from fabric_core.supervisor import *; sys.exit(run_ranks(RankCommand(sys.argv[1]), " \
       "num_processes=2, num_nodes=2, node_rank=int(sys.argv[2]), main_port=int(sys.argv[3])))"
nodes = [subprocess.Popen([sys.executable, "-c", node, sys.argv[2], str(n), str(port)]) for n in range(2)]
sys.exit(max([n.wait() for n in nodes]))
"""
    source = """
    import json
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE NODE_RANK GROUP_RANK".split()
    with open(f"rank-{rank}.json", "w") as file:
        json.dump([[int(os.environ[name]) for name in names], "FABRIC_LISTEN_FD" in os.environ], file)
    """
    assert start(2, source, program=two).finish() == 0
    facts = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    assert facts == [[[r, r % 2, 4, 2, r // 2, r // 2], r == 0] for r in range(4)]


def test_rank_variables_share_the_processors_unless_the_user_has_decided(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("fabric_core.supervisor.variables._usable_cpus", lambda: 5)
    threads = [rank_variables(0, num_processes=n, main_port=1)["OMP_NUM_THREADS"] for n in (1, 2, 8)]
    assert threads == ["5", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert rank_variables(0, num_processes=2, main_port=1)["OMP_NUM_THREADS"] == "7"


@both_ways
def test_the_environment_handlers_and_descriptors_of_the_parent_stay_as_they_were(tmp_path, way):
    script = tmp_path / "train.py"
    script.write_text(
        "import os; assert os.environ['EXTRA'] == 'yes'; assert os.environ['FABRIC_LAUNCHED'] == '1'"
    )
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)

    def state() -> tuple[object, ...]:
        return (
            dict(os.environ),
            [signal.getsignal(signum) for signum in signals],
            signal.pthread_sigmask(signal.SIG_BLOCK, []),
            psutil.Process().num_fds(),
            threading.active_count(),
        )

    before = state()
    warm = WarmStart(required=True) if way == "warm" else None
    assert run_ranks(RankCommand(str(script)), num_processes=2, env={"EXTRA": "yes"}, warm=warm) == 0
    assert state() == before


def test_the_parent_that_only_supervises_imports_little(tmp_path):
    program = """
import time, sys
started = time.process_time()
import fabric_core.supervisor
print((time.process_time() - started) * 1000)
print(*sys.modules)
"""
    env = {
        **os.environ,
        "PYTHONPYCACHEPREFIX": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "",
    }  # as when installed
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env
        ).stdout
        for _ in range(4)
    ]
    assert min(float(run.splitlines()[0]) for run in runs) < 60, "milliseconds of CPU"
    heavy = {"torch", "numpy", "multiprocessing", "asyncio", "pluggy", "importlib.metadata", "logging"}
    assert not heavy & set(runs[0].splitlines()[1].split())


# --------------------------------------------------------------------- processes of the multiprocessing module

IN_PROGRAM = """
import multiprocessing, os, signal, sys, threading, time
from fabric_core.errors import RankFailedError
from fabric_core.supervisor import *

def work(rank, error_dir, parent):
    __tracebackhide__ = True
    with enter_rank(rank, error_dir, parent_pid=parent):
        users_function(rank)

def users_function(rank):
    with open(f"pid-{rank}.part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"pid-{rank}.part", f"pid-{rank}")
    if rank == 1 and os.environ["FAIL"] == "1":
        raise ValueError("boom")
    time.sleep(60 if os.environ["FAIL"] else 0)

def launch():
    context = multiprocessing.get_context(os.environ["START"])
    def start(error_dir):
        for rank in range(2):
            process = context.Process(target=work, args=(rank, error_dir, os.getpid()))
            process.start()
            yield rank, ProcessChild(process)
    with error_directory() as error_dir:
        raise_for_outcome(supervise(start(error_dir), error_dir=error_dir))

if __name__ == "__main__":
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        if os.environ.get("THREAD"):
            thread = threading.Thread(target=launch)
            thread.start()
            thread.join()
        else:
            launch()
        print("succeeded")
    except RankFailedError as error:
        print(error.rank, error.exit_code, error, sep="\\n")
    except KeyboardInterrupt:
        print("KeyboardInterrupt")
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert multiprocessing.active_children() == []
    assert threading.active_count() == 1
    print("the parent lives on")
"""


@pytest.fixture
def start_program(start, tmp_path):
    (tmp_path / "program.py").write_text(IN_PROGRAM)
    # As a script, because spawned processes import it again.
    program = "import os, sys; os.execv(sys.executable, [sys.executable, 'program.py'])"
    return lambda method, fail, **env: start(2, "", program=program, START=method, FAIL=fail, **env)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_failure_inside_a_program_is_an_exception_that_ends_with_the_traceback_of_the_rank(
    start_program, method
):
    job = start_program(method, "1")
    assert job.finish() == 0
    rank, code, headline, *traceback, last, epilogue = job.out.splitlines()
    assert (rank, code, headline) == ("1", "1", "Rank 1 failed: ValueError: boom")
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[1].endswith("in users_function")
    assert (last, epilogue) == ("ValueError: boom", "the parent lives on")
    assert job.err == ""


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("to_all", [True, False], ids=["to_the_group", "to_the_parent"])
def test_ctrl_c_inside_a_program_ends_the_ranks_and_is_raised_again(start_program, method, to_all):
    job = start_program(method, "no")
    job.pids()
    (os.killpg if to_all else os.kill)(job.process.pid, signal.SIGINT)
    assert job.finish() == 0
    assert job.out.splitlines() == ["KeyboardInterrupt", "the parent lives on"]
    assert job.err == ""


def test_sigterm_inside_a_program_ends_the_ranks_and_then_the_program(start_program):
    job = start_program("fork", "no")
    job.pids()
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.process.wait(30) == -signal.SIGTERM
    assert job.living() == []


def test_kill_9_of_a_program_leaves_no_forked_rank_alive(start_program):
    job = start_program("fork", "no")
    job.pids()
    job.process.kill()
    wait_until(lambda: not job.living())


def test_supervision_works_outside_the_main_thread(start_program):
    job = start_program("fork", "", THREAD="1")
    assert job.finish() == 0
    assert job.out.splitlines() == ["succeeded", "the parent lives on"]


# --------------------------------------------------------------------- decisions, shown with made-up processes


class FakeChild:
    """A process that ends when it is told to."""

    def __init__(
        self,
        *statuses: int | None,
        dies_of: tuple[int, ...] = (signal.SIGTERM, signal.SIGKILL),
        before_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.pid = 0
        self.before_death = before_death
        self.statuses = list(statuses)
        self.dies_of = dies_of
        self.received: list[int] = []

    def poll(self) -> int | None:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if status is not None:
            self.before_death()
        return status

    def send_signal(self, sig: int, /) -> None:
        self.received.append(sig)
        if sig in self.dies_of:
            self.statuses = [-sig]


@pytest.fixture
def error_dir() -> Iterator[str]:
    with error_directory() as path:
        yield path


def record(error_dir: str, rank: int, time: float, summary: str) -> None:
    write_failure(error_dir, Failure(rank, 1, time, summary, f"Traceback\n{summary}\n"))


def test_of_failures_found_at_once_the_earliest_is_the_first(error_dir):
    now = time.monotonic()
    record(error_dir, 0, now - 1.0, "consequence")
    record(error_dir, 1, now - 2.0, "cause")
    record(error_dir, 2, now - 0.5, "consequence")
    outcome = supervise([(rank, FakeChild(1)) for rank in range(3)], error_dir=error_dir)
    assert outcome.first.rank == 1
    assert [failure.rank for failure in outcome.later] == [0, 2]


def test_a_kill_found_together_with_an_exception_is_its_cause(error_dir):
    def fail() -> None:
        record(error_dir, 0, time.monotonic(), "connection reset")

    ranks = [(0, FakeChild(None, 1, before_death=fail)), (1, FakeChild(None, -signal.SIGKILL))]
    outcome = supervise(ranks, error_dir=error_dir)
    assert outcome.first.rank == 1
    assert outcome.exit_code == 137


def test_an_abort_is_ordered_by_when_it_dumped_its_stacks(error_dir):
    record(error_dir, 0, time.monotonic() - 1.0, "cause")
    Path(crash_path(error_dir, 1)).write_text("Fatal Python error: Aborted\n")
    outcome = supervise([(0, FakeChild(None, 1)), (1, FakeChild(None, -signal.SIGABRT))], error_dir=error_dir)
    assert outcome.first.rank == 0
    assert outcome.later[0].text.startswith("Fatal Python error")


def test_what_the_supervisor_has_ended_is_no_failure():
    survivor = FakeChild(None)
    outcome = supervise([(0, FakeChild(None, 7)), (1, survivor)])
    assert survivor.received == [signal.SIGTERM]
    assert (outcome.exit_code, outcome.first.rank, outcome.later) == (7, 0, ())


def test_a_start_that_fails_ends_those_already_started():
    started = FakeChild(None)

    def children():
        yield 0, started
        raise OSError("no more processes")

    with pytest.raises(OSError, match="no more processes"):
        supervise(children())
    assert started.received == [signal.SIGKILL]


def test_a_process_that_not_even_sigkill_ends_does_not_hang_the_supervisor(monkeypatch):
    monkeypatch.setattr(watch, "_HOPELESS_AFTER", 0.1)
    stuck = FakeChild(None, dies_of=())
    stuck.pid = os.getpid()
    outcome = supervise([(0, stuck), (1, FakeChild(1))], grace=0.1)
    assert stuck.received[:2] == [signal.SIGTERM, signal.SIGKILL]
    assert outcome.undead == (os.getpid(),)
    with pytest.raises(RankFailedError, match=rf"^Process {os.getpid()} does not end"):
        raise_for_outcome(outcome)


def test_deaths_are_noticed_where_the_system_does_not_announce_them(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    sleeper, failing = (
        subprocess.Popen([sys.executable, "-c", f"import sys, time; time.sleep({s}); sys.exit({s})"])
        for s in (60, 0.2)
    )
    failing.kill()
    assert supervise([(0, sleeper), (1, failing)]).exit_code == 137
    assert sleeper.poll() == -signal.SIGTERM


def test_a_mark_on_the_exception_that_caused_another_counts():
    cause, effect = ValueError(), RuntimeError()
    mark_failure(cause)
    marked = failed_at(cause)
    mark_failure(cause)
    assert failed_at(cause) == marked, "the first mark stays"
    effect.__cause__ = cause
    cause.__context__ = effect  # a circle must not hang it
    assert failed_at(effect) == marked


def test_many_failures_are_told_in_few_lines(capsys):
    failures = [Failure(rank, 1, float(rank), "RuntimeError: lost", "Traceback\n") for rank in range(100)]
    report(Outcome(1, failures[0], tuple(failures[1:])))
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 7
    assert "fabric: 95 more ranks then failed\n" in err
    assert err.endswith("fabric: rank 0 failed first: RuntimeError: lost\nTraceback\n")
