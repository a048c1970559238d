"""Ranks that are started again, and ranks that stop before the end: with real processes, which need no PyTorch."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from supervised import Supervised, all_killed

from fabric_core.errors import LaunchError
from fabric_core.supervisor import PREEMPTED, Outcome, RankCommand, raise_for_outcome, run_ranks

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")

SUPERVISOR = """
import sys
from fabric_core.supervisor import RankCommand, run_ranks
sys.exit(run_ranks(RankCommand(sys.argv[1]), num_processes=2, grace=5, max_restarts=int(sys.argv[2])))
"""

PREAMBLE = """
import os, signal, sys, time
from fabric_core.supervisor import Milestone, tell_supervisor
rank, restarts = int(os.environ["RANK"]), int(os.environ["FABRIC_RESTARTS"])
open(f"attempt-{restarts}-{rank}", "w").write(os.environ["MASTER_PORT"])
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def joined():
    tell_supervisor(Milestone.JOINED)
    open(f"joined-{restarts}-{rank}.part", "w").write(str(os.getpid()))
    os.rename(f"joined-{restarts}-{rank}.part", f"joined-{restarts}-{rank}")
    while not all(os.path.exists(f"joined-{restarts}-{other}") for other in range(2)):
        time.sleep(0.01)
def watch(*signals):
    told = []
    for signum in signals:
        signal.signal(signum, lambda signum, _: told.append(signum))
    tell_supervisor(Milestone.WATCHES)
    return told
def stop_when(told):
    while not told:
        time.sleep(0.01)
    tell_supervisor(Milestone.PREEMPTED)
"""


class Job(Supervised):
    """A supervisor of two ranks."""

    def __init__(self, folder: Path, source: str, max_restarts: int) -> None:
        script = folder / "train.py"
        script.write_text(PREAMBLE + source)
        super().__init__(folder, sys.executable, "-c", SUPERVISOR, str(script), str(max_restarts), cwd=folder)

    def pids(self, restarts: int = 0) -> list[int]:
        """The ranks of an attempt, once they have met."""
        return list(map(int, self.said(*(f"joined-{restarts}-{rank}" for rank in range(2)))))

    def end(self, within: float = 20) -> tuple[int, str, list[str]]:
        """Exit code, standard output, and what the supervisor said of itself."""
        out, err = self.process.communicate(timeout=within)
        return (
            self.process.returncode,
            out,
            [line for line in err.splitlines() if line.startswith("fabric: ")],
        )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    with all_killed() as jobs:

        def begin(source: str, max_restarts: int = 0) -> Job:
            jobs.append(Job(tmp_path, source, max_restarts))
            return jobs[-1]

        yield begin


def test_a_killed_rank_and_one_that_raises_are_started_again_with_all_others(
    start: Callable[..., Job],
) -> None:
    job = start(
        """
joined()
if restarts == 1 and rank == 0:
    raise ValueError("boom")
if restarts < 2:
    time.sleep(60)
say("done", rank)
""",
        max_restarts=2,
    )
    os.kill(job.pids()[1], signal.SIGKILL)
    code, out, said = job.end()
    assert (code, sorted(out.splitlines())) == (0, ["done 0", "done 1"])
    assert said == [
        "fabric: rank 1 failed: killed by SIGKILL (the system may have run out of memory: see dmesg)",
        "fabric: all ranks are started again: restart 1 of 2",
        "fabric: rank 0 failed: ValueError: boom",
        "fabric: all ranks are started again: restart 2 of 2",
    ]
    ports = {path.name: path.read_text() for path in job.folder.glob("attempt-*")}
    assert len(ports) == 6
    assert len(set(ports.values())) > 1, "they meet anew"


def test_a_rank_that_always_fails_is_given_up_after_so_many_restarts(start: Callable[..., Job]) -> None:
    code, _, said = start("joined()\nsys.exit(rank and 7)", max_restarts=1).end()
    assert code == 7
    assert said == [
        "fabric: rank 1 failed: exited with code 7",
        "fabric: all ranks are started again: restart 1 of 1",
        "fabric: rank 1 failed: exited with code 7",
        "fabric: not started again: this was restart 1 of 1",
    ]


def test_what_fails_before_the_ranks_have_met_is_not_tried_again(start: Callable[..., Job]) -> None:
    job = start("import no_such_module", max_restarts=3)
    code, _, said = job.end()
    assert code == 1
    assert said[-1] == (
        "fabric: not started again: no rank had met the others yet, so the next attempt would end alike"
    )
    assert not list(job.folder.glob("attempt-1-*"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_told_to_end_is_not_started_again(
    start: Callable[..., Job], signum: signal.Signals
) -> None:
    job = start("joined()\ntime.sleep(60)", max_restarts=3)
    job.pids()
    os.kill(job.process.pid, signum)
    code, _, said = job.end()
    assert code == 128 + signum
    assert len(said) == 1


def test_nor_is_one_that_is_told_to_end_while_it_ends_for_a_failure(start: Callable[..., Job]) -> None:
    source = "signal.signal(signal.SIGTERM, signal.SIG_IGN) if rank else None\njoined()\ntime.sleep(60)"
    job = start(source, max_restarts=3)
    os.kill(job.pids()[0], signal.SIGKILL)
    time.sleep(0.6)
    os.kill(job.process.pid, signal.SIGTERM)
    code, _, said = job.end()
    assert code == 128 + signal.SIGKILL
    assert "fabric: rank 0 failed" in said[-1]


def test_restarts_of_several_nodes_and_other_nonsense_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.py").touch()
    command = RankCommand(str(tmp_path / "x.py"))
    with pytest.raises(LaunchError, match="Cannot start the ranks of 2 nodes again: .* torchrun"):
        run_ranks(command, num_processes=1, num_nodes=2, max_restarts=1)
    with pytest.raises(LaunchError, match="cannot be started again -1 times"):
        run_ranks(command, num_processes=1, max_restarts=-1)


# -- stopped before the end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("code", [0, 75])
def test_ranks_that_stop_because_of_a_signal_end_the_job_with_75_and_are_not_started_again(
    start: Callable[..., Job], signum: signal.Signals, code: int
) -> None:
    source = f"told = watch(signal.{signum.name})\njoined()\nstop_when(told)\nsys.exit({code})"
    job = start(source, max_restarts=3)
    job.pids()
    os.kill(job.process.pid, signum)
    assert job.end() == (
        75,
        "",
        ["fabric: preempted: every rank has stopped before the end (exit code 75)"],
    )


def test_a_rank_that_hears_of_the_end_by_itself_ends_the_job_with_75_too(start: Callable[..., Job]) -> None:
    job = start("told = watch(signal.SIGTERM)\njoined()\nstop_when(rank == 1 or told)")
    os.kill(job.pids()[0], signal.SIGTERM)
    assert job.end()[0] == 75


def test_a_launch_inside_a_program_ends_it_with_75_if_the_program_was_told_to_end() -> None:
    raise_for_outcome(Outcome(PREEMPTED))
    with pytest.raises(SystemExit, match="75"):
        raise_for_outcome(Outcome(PREEMPTED, signum=signal.SIGTERM))


def test_the_exit_code_75_alone_is_a_failure(start: Callable[..., Job]) -> None:
    code, _, said = start("joined()\nsys.exit(75 * rank)").end()
    assert (code, said) == (75, ["fabric: rank 1 failed: exited with code 75"])


def test_a_failure_while_the_job_is_being_stopped_is_told(start: Callable[..., Job]) -> None:
    source = """
told = watch(signal.SIGTERM)
joined()
stop_when(told)
if rank == 1:
    raise OSError("no space left")
"""
    job = start(source, max_restarts=3)
    job.pids()
    os.kill(job.process.pid, signal.SIGTERM)
    code, _, said = job.end()
    assert (code, said) == (1, ["fabric: ended by SIGTERM", "fabric: rank 1 failed: OSError: no space left"])


def test_who_takes_sigterm_for_an_announcement_does_not_outlive_a_failed_rank(
    start: Callable[..., Job],
) -> None:
    """Nor does a rank that hangs where no handler of Python's runs."""
    job = start("watch(signal.SIGTERM)\njoined()\nwhile True: time.sleep(60)")
    started = time.monotonic()
    os.kill(job.pids()[0], signal.SIGKILL)
    assert job.end()[0] == 128 + signal.SIGKILL
    assert time.monotonic() - started < 5


def test_an_announcement_ends_a_rank_that_does_not_know_it_as_it_would_end_any_program(
    start: Callable[..., Job],
) -> None:
    job = start("joined()\ntime.sleep(60)")
    job.pids()
    os.kill(job.process.pid, signal.SIGUSR1)
    code, _, said = job.end()
    assert code == 128 + signal.SIGUSR1
    assert said[-1].endswith("killed by SIGUSR1")


def test_a_second_sigterm_is_passed_on_too(start: Callable[..., Job]) -> None:
    source = """
told = watch(signal.SIGTERM)
joined()
while len(told) < 2:
    time.sleep(0.01)
say("twice", rank)
"""
    job = start(source)
    job.pids()
    os.kill(job.process.pid, signal.SIGTERM)
    time.sleep(2.2)
    os.kill(job.process.pid, signal.SIGTERM)
    code, out, _ = job.end()
    assert code == 128 + signal.SIGTERM
    assert sorted(out.splitlines()) == ["twice 0", "twice 1"]
