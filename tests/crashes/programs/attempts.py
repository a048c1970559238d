"""Starting the job once, from a process that has everything imported: a restart costs a fraction of a second.

The process forks a supervisor, which forks the ranks. It computes nothing itself, because the threads which that starts
would be missing in the copies.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from points import Board, Plan
from training import RANKS, Job

PATIENCE = 180.0
"""Seconds after which an attempt counts as hanging."""


@dataclass(frozen=True)
class Attempt:
    """How one start of the job ended.

    Attributes:
        hit: Whether what was planned has happened; ``phase``: in which phase it found the rank.
        code: The exit code of the job.
        output: What it wrote.
        seconds: How long it took.
    """

    hit: bool
    phase: str
    code: int
    output: str
    seconds: float


class Attempts:
    """Starts a job again and again.

    Args:
        launch: Starts the ranks, each of which calls `train`, and returns or raises when they have ended.
        folder: For what the job writes to its terminal.
    """

    def __init__(self, launch: Callable[[Job], None], folder: Path) -> None:
        self.launch = launch
        self.board = Board(RANKS)
        self._output = folder / "output"

    def start(self, life: Path, plan: Plan | None = None) -> Attempt:
        """Start the job in the folder of a training, do what is planned, and wait for its end."""
        life.mkdir(exist_ok=True)
        self.board.clear()
        began = time.monotonic()
        supervisor = os.fork()
        if supervisor == 0:
            self._become_supervisor(Job(life, self.board, plan))
        hit, phase = False, ""
        while not (ended := os.waitpid(supervisor, os.WNOHANG))[0]:
            seconds = time.monotonic() - began
            if seconds > PATIENCE:
                os.kill(supervisor, signal.SIGKILL)
            elif plan is not None and not phase and self._is_time(plan, seconds):
                phase = self.board.phase(plan.rank if plan.victim == RANKS else plan.victim)
                hit = self._kill(plan, supervisor)
            time.sleep(0.0005)
        if plan is not None and plan.kind in ("point", "fail"):
            hit, phase = self.board.reached(plan.rank), self.board.phase(plan.rank)
        code = os.waitstatus_to_exitcode(ended[1])
        return Attempt(hit, phase, code, self._output.read_text(), time.monotonic() - began)

    def warm_up(self, life: Path) -> None:
        """Import what a whole training imports, once and for all."""
        first = self.start(life)
        if first.code:
            raise RuntimeError(f"exit code {first.code} after {first.seconds:.0f} seconds\n{first.output}")
        for name in (life / "modules").read_text().splitlines():
            with contextlib.suppress(Exception):  # some only look like modules
                importlib.import_module(name)

    def _is_time(self, plan: Plan, seconds: float) -> bool:
        """Whether somebody has to be killed now."""
        if plan.kind == "around" and self.board.reached(plan.rank):
            time.sleep(plan.seconds)
            return True
        return plan.kind == "time" and seconds >= plan.seconds and all(map(self.board.pid, range(RANKS)))

    def _kill(self, plan: Plan, supervisor: int) -> bool:
        victim = supervisor if plan.victim == RANKS else self.board.pid(plan.victim)
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:  # it has just come to its end
            return False
        return True

    def _become_supervisor(self, job: Job) -> None:
        code = 1
        try:
            descriptor = os.open(self._output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            self.launch(job)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
