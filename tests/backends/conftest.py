"""What the tests of the backends share: scripts that run for real on several processes, and what these answer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from outside import outside_of_jobs

SUPERVISOR = """
import sys
from fabric_core.supervisor import RankCommand, WarmStart, run_ranks
script, processes, *imports = sys.argv[1:]
sys.exit(run_ranks(RankCommand(script), num_processes=int(processes), warm=WarmStart(tuple(imports))))
"""

IMPORTED = re.compile(r"^(?:from|import) ((?:torch|fabric_)[\w.]*)", re.MULTILINE)
"""What a script imports first of all. One process does so, and is copied for each rank, as by ``fabric run``."""

# What every script begins with: a strategy on this rank, and a way to tell the test what was found.
PREAMBLE = """
import os, sys, time
import torch
import torch.distributed as dist
from fabric_backends.strategies.ddp import DDPStrategy
from fabric_core.contracts.strategy import Surroundings
from fabric_core.parts.cpu import CPUAccelerator
from fabric_core.parts.full_precision import FullPrecision
from fabric_core.parts.local import LocalEnvironment
from fabric_core.parts.torch_file import TorchFile

rank = int(os.environ.get("RANK", "0"))
world = int(os.environ.get("WORLD_SIZE", "1"))

def answer(value):
    torch.save(value, f"answer-{rank}.part")
    os.rename(f"answer-{rank}.part", f"answer-{rank}")

def attached(strategy, environment=None):
    parts = CPUAccelerator(), FullPrecision(), environment or LocalEnvironment(), TorchFile()
    strategy.attach(Surroundings(*parts, (torch.device("cpu"),) * world, world, 1))
    return strategy

def connected(environment=None, **options):
    strategy = attached(DDPStrategy(**options), environment)
    strategy.connect()
    return strategy

def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)

def threads():
    return len(os.listdir("/proc/self/task"))
"""


@dataclass(frozen=True)
class Finished:
    """How a program ended.

    Attributes:
        code: Its exit code.
        answers: What the ranks answered, by rank; those that did not are missing.
        out, err: What it wrote.
    """

    code: int
    answers: dict[int, Any]
    out: str
    err: str


@dataclass
class Programs:
    """Runs programs in an empty folder and an environment without traces of a launcher."""

    folder: Path
    environ: dict[str, str]
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def write(self, text: str, name: str = "script.py", preamble: str = PREAMBLE) -> Path:
        """Write a script that begins with the preamble."""
        path = self.folder / name
        path.write_text(preamble + textwrap.dedent(text), encoding="utf-8")
        return path

    def start(self, *command: str, **environ: str) -> subprocess.Popen[str]:
        """Start the interpreter with some arguments, in a process group of its own."""
        for path in self.folder.glob("answer-*"):
            path.unlink()
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env={**self.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.running.append(process)
        return process

    def finish(self, process: subprocess.Popen[str], timeout: float = 100) -> Finished:
        """Wait for a program and collect what it left."""
        out, err = process.communicate(timeout=timeout)
        answers = {
            int(path.name.removeprefix("answer-")): torch.load(path, weights_only=False)
            for path in self.folder.glob("answer-*")
        }
        return Finished(process.returncode, answers, out, err)

    def run(self, *command: str, timeout: float = 100, **environ: str) -> Finished:
        """Run the interpreter with some arguments until it ends."""
        return self.finish(self.start(*command, **environ), timeout)

    def on_ranks(self, text: str, num_processes: int = 2, timeout: float = 100, **environ: str) -> Finished:
        """Run a script on several ranks. Warnings are errors there, too."""
        script = self.write(text)
        imports = dict.fromkeys(IMPORTED.findall(script.read_text(encoding="utf-8")))
        supervisor = ("-W", "error", "-c", SUPERVISOR, str(script), str(num_processes), *imports)
        return self.run(*supervisor, timeout=timeout, **environ)

    def answers_of(self, text: str, num_processes: int = 2, **options: Any) -> list[Any]:
        """What the ranks of a script answered, once all of them have ended well."""
        finished = self.on_ranks(text, num_processes, **options)
        assert finished.code == 0, finished.err
        assert sorted(finished.answers) == list(range(num_processes)), finished.err
        return [finished.answers[rank] for rank in range(num_processes)]

    def wait_for(self, *names: str, timeout: float = 60) -> None:
        """Wait until some files are there."""
        until = time.monotonic() + timeout
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < until, f"still missing: {names}"
            time.sleep(0.02)

    def end_all(self) -> None:
        for process in self.running:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.communicate()


def programs_in(folder: Path) -> Iterator[Programs]:
    environ = outside_of_jobs("GLOO_", "OMP_", "PYTHON")
    programs = Programs(folder, environ)
    yield programs
    programs.end_all()


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    """Programs in the test's folder; none of them outlives it."""
    yield from programs_in(tmp_path)


@pytest.fixture(scope="module")
def shared_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """The same for a whole file: starting processes takes longer than most of what is asked of them."""
    yield from programs_in(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def gone() -> Callable[..., float]:
    """Wait until processes have ended; the seconds it took."""

    def wait(*pids: int, timeout: float = 40) -> float:
        started = time.monotonic()
        while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            assert time.monotonic() - started < timeout, "still there"
            time.sleep(0.01)
        return time.monotonic() - started

    return wait
