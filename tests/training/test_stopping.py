"""Being stopped before the end: real signals to one rank, at random moments, and to the supervisor."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stoppable import MOST_STEPS, loss_after
from supervised import Supervised, all_killed

PROGRAM = Path(__file__).parent / "programs" / "stoppable.py"
RUN = (sys.executable, "-m", "fabric_core", "run", "--devices=2")


class Stoppable(Supervised):
    """The program, running."""

    def pids(self, number: int) -> list[int]:
        """The ranks, once both are in the middle of a round."""
        return list(map(int, self.said(*(f"pid-{number}-{rank}" for rank in range(2)))))

    def check(self, number: int) -> int:
        """All ranks stopped at the same step, with the numbers of the plain loop; the step."""
        (step, loss), other = (
            json.loads((self.folder / f"end-{number}-{rank}.json").read_text()) for rank in range(2)
        )
        assert other == [step, loss]
        assert 3 <= step < MOST_STEPS
        assert loss == pytest.approx(loss_after(step), abs=1e-6)
        return step

    def end(self, within: float = 60) -> tuple[int, str]:
        """Exit code and what was written to stderr."""
        _, stderr = self.process.communicate(timeout=within)
        return self.process.returncode, stderr


@pytest.fixture
def start(tmp_path: Path, clean_environ: dict[str, str]) -> Iterator[Callable[..., Stoppable]]:
    with all_killed() as running:

        def begin(*strategies: str, options: tuple[str, ...] = ()) -> Stoppable:
            command = (*RUN, *options, str(PROGRAM), str(tmp_path), *strategies)
            running.append(Stoppable(tmp_path, *command, env=clean_environ))
            return running[-1]

        yield begin


def test_a_signal_to_one_rank_stops_all_at_the_same_step(start: Callable[..., Stoppable]) -> None:
    chance = random.Random(21)
    rounds = ["ddp", "ddp", "fsdp", "fsdp", "deepspeed", "deepspeed_stage_3"]
    running = start(*rounds)
    for number in range(len(rounds)):
        pids = running.pids(number)
        time.sleep(chance.random() * 0.6)
        os.kill(chance.choice(pids), signal.SIGTERM)
    code, stderr = running.end()
    assert code == 75, stderr
    assert stderr.endswith("fabric: preempted: every rank has stopped before the end (exit code 75)\n")
    steps = [running.check(number) for number in range(len(rounds))]
    assert len(set(steps)) > 1, "at moments of chance"


def test_a_signal_to_every_process_of_the_job_stops_the_ranks_and_not_their_loaders(
    start: Callable[..., Stoppable],
) -> None:
    """As SLURM sends it: to the supervisor, which passes it on, to the ranks, and to the workers of the loaders."""
    running = start("ddp")
    running.pids(0)
    os.killpg(running.process.pid, signal.SIGTERM)
    code, stderr = running.end(within=40)
    assert code == 75, stderr
    assert stderr == "fabric: preempted: every rank has stopped before the end (exit code 75)\n"
    running.check(0)
