"""Whatever dies, in whatever way: the job ends soon, says why, and nothing of it remains."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

PROGRAM = Path(__file__).parent / "programs" / "endless.py"
RUN = ("-m", "fabric_core", "run", "--strategy=ddp", "--devices=2")
WAYS = {
    "fabric run": (*RUN, str(PROGRAM)),
    "fabric run, fresh": (*RUN, "--start=fresh", str(PROGRAM)),
    "launch": (str(PROGRAM),),
}
"""Ranks are copies of a warm process, unless they are to be fresh."""
CODE_FLAGS = '{"strategy": "ddp", "devices": "2"}'


@dataclass
class Job:
    """A running job."""

    parent: subprocess.Popen[str]
    ranks: dict[int, int]
    family: list[psutil.Process]

    def end(self, within: float) -> tuple[int, str]:
        """Wait until everything is gone; the parent's exit code and what it wrote to stderr."""
        started = time.monotonic()
        _, stderr = self.parent.communicate(timeout=within)
        left = max(0.1, within - (time.monotonic() - started))
        _, alive = psutil.wait_procs(self.family, timeout=left)
        assert not alive, f"still alive: {alive}"
        return self.parent.returncode, stderr


def told(folder: Path) -> dict[int, int]:
    """The processes of the ranks that have said who they are. A file that is made is not written yet."""
    texts = {int(path.name): path.read_text() for path in folder.iterdir()}
    return {rank: int(text) for rank, text in texts.items() if text}


@pytest.fixture
def job(tmp_path: Path, clean_environ: dict[str, str]) -> Iterator[Callable[..., Job]]:
    """Start a job and wait until every rank has done a step (or until it is over, when it is to fail)."""
    jobs: list[Job] = []

    def start(*arguments: str, way: str = "fabric run") -> Job:
        environ = clean_environ | ({"FABRIC_RUN": CODE_FLAGS} if way == "launch" else {})
        parent = subprocess.Popen(
            [sys.executable, *WAYS[way], str(tmp_path), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while len(ranks := told(tmp_path)) < 2 and parent.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        family = psutil.Process(parent.pid).children(recursive=True) if parent.poll() is None else []
        jobs.append(Job(parent, ranks, family))
        return jobs[-1]

    yield start
    for each in jobs:
        for process in each.family:
            if process.is_running():
                process.kill()
        each.parent.kill()
        each.parent.communicate()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_with_its_exit_code(job: Callable[..., Job], way: str, rank: int) -> None:
    running = job(way=way)
    assert len(running.family) >= 4  # two ranks, each with a worker
    os.kill(running.ranks[rank], signal.SIGKILL)
    code, stderr = running.end(within=20)
    assert code == 128 + signal.SIGKILL
    assert f"rank {rank}" in stderr.strip().splitlines()[-1].lower()


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_parent_takes_everything_with_it(job: Callable[..., Job], way: str) -> None:
    running = job(way=way)
    running.parent.kill()
    running.end(within=5)


@pytest.mark.parametrize("way", ["fabric run", "launch"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_a_rank_is_what_is_seen_last(job: Callable[..., Job], way: str, rank: int) -> None:
    code, stderr = job("--fail", str(rank), way=way).end(within=30)
    assert code == 1
    assert stderr.strip().splitlines()[-1] == f"ValueError: rank {rank} has had enough"
    assert stderr.count("Traceback (most recent call last)") == 1


@pytest.mark.parametrize("way", ["fabric run", "launch"])
@pytest.mark.parametrize("everybody", [True, False], ids=["to the group", "to the parent"])
def test_an_interrupt_ends_everything_within_three_seconds(
    job: Callable[..., Job], way: str, everybody: bool
) -> None:
    running = job(way=way)
    (os.killpg if everybody else os.kill)(running.parent.pid, signal.SIGINT)
    code, stderr = running.end(within=3)
    assert code == 128 + signal.SIGINT
    assert "Traceback" not in stderr


def test_a_port_that_is_taken_is_an_error_before_anything_starts(
    fabric_run: Callable[..., Any], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = fabric_run("endless", "--devices=2", f"--main-port={port}", tmp_path, check=False)
    assert done.returncode != 0
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_job_on_one_node_listens_on_loopback_only(job: Callable[..., Job]) -> None:
    running = job()
    pids = [running.parent.pid, *running.ranks.values()]
    listening = {
        connection.laddr.ip
        for pid in pids
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork", "ddp_spawn"])
def test_the_rank_that_failed_first_is_blamed_and_not_the_one_that_waited(
    strategy: str, clean_environ: dict[str, str]
) -> None:
    program = PROGRAM.with_name("divided.py")
    done = subprocess.run(
        [sys.executable, str(program), strategy],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environ,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "ValueError: this is the cause"
