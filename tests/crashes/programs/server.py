"""Kills a training again and again, and compares what becomes of it with one that is never killed.

``server.py CONFIG`` prints a report, both as JSON. The config: ``strategy``; ``folder``, which is empty; ``seed``;
``crashes``, how many at random; ``sweep``, whether to crash in every moment of two saves besides; ``faults``, how many
system calls are to fail; ``disk``, whether to try a disk that is full and one that cannot be written to, for which this
process has to be allowed to mount.
"""

from __future__ import annotations

import errno
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from attempts import Attempt, Attempts
from points import Plan
from training import EVERY, RANKS, STEPS, Job, checkpoints_of, train

from fabric_core import Fabric

KINDS = {"point": 0.5, "around": 0.3, "time": 0.2}
"""How often each kind of crash is chosen."""

FAULTS = {
    errno.EIO: "Input/output error",
    errno.ENOSPC: "No space left on device",
    errno.EROFS: "Read-only file system",
}


@dataclass
class Report:
    """What happened.

    Attributes:
        crashes: How many times somebody was killed; ``phases``: in which phase, and how often; ``victims``: who.
        faults: How many times a system call failed; ``errors``: what the job said then, in its last line.
        starts, trainings: How many times the job was started, and how many trainings were brought to their end.
        differ: Where such a training was not the same as one that was never killed.
        complaints: Checkpoints that were torn or lost.
        failures: What failed although nothing was done to it, or failed without a clear error.
        seconds: Of one training, and of everything.
    """

    crashes: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    victims: dict[str, int] = field(default_factory=dict)
    faults: int = 0
    errors: list[str] = field(default_factory=list)
    starts: int = 0
    trainings: int = 0
    differ: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Crashes:
    """The crashes of one job, and what becomes of the training."""

    def __init__(self, launch: Callable[[Job], None], folder: Path, seed: int) -> None:
        self.attempts = Attempts(launch, folder)
        self.folder, self.report = folder, Report()
        self.chance = random.Random(seed)
        self.attempts.warm_up(folder / "warming")
        first = self.attempts.start(folder / "reference")
        if first.code:
            raise RuntimeError(first.output)
        self.usual = self.report.seconds["a training"] = first.seconds
        self.moments = [self.attempts.board.counts(rank) for rank in range(RANKS)]
        self.expected = left_by(folder / "reference")
        self.savers = [rank for rank in range(RANKS) if self.moments[rank]["save"]]

    def at_random(self) -> Iterator[Plan]:
        """Most crashes are in one of the next two saves, some in a load, some at any time."""
        while True:
            kind = self.chance.choices(list(KINDS), list(KINDS.values()))[0]
            rank = self.chance.choice(self.savers)
            victim = rank if kind == "point" else self.chance.randrange(RANKS + 1)
            if kind == "time":
                yield Plan(kind, victim=victim, seconds=self.chance.uniform(0, self.usual))
                continue
            phase = self.chance.choices(("save", "load"), (0.8, 0.2))[0]
            most = self.of_a_save(rank) * 2 if phase == "save" else self.moments[rank]["end"]
            moment = self.chance.randint(1, max(1, most))
            yield Plan(kind, rank, phase, moment, victim, self.chance.uniform(0, 0.01))

    def sweep(self) -> Iterator[Plan]:
        """Each moment of two saves, on each rank that has any."""
        for rank in self.savers:
            for moment in range(1, 2 * self.of_a_save(rank) + 1):
                yield Plan("point", rank, "save", moment, rank)

    def faults(self) -> Iterator[Plan]:
        """System calls that fail, in a save or a load."""
        while True:
            rank, phase = self.chance.choice(self.savers), self.chance.choice(("save", "save", "load"))
            moment = self.chance.randint(1, self.of_a_save(rank))
            yield Plan("fail", rank, phase, moment, error=self.chance.choice(list(FAULTS)))

    def of_a_save(self, rank: int) -> int:
        """How many moments a save has on a rank, on average, with the rotation."""
        return self.moments[rank]["save"] * EVERY // STEPS

    def run(self, plans: Iterator[Plan], hits: int) -> None:
        """Do what is planned until so many plans have come true, to trainings that are each brought to their end.

        A plan whose moment does not come before the training is over is dropped, and the next one taken.
        """
        hits += self.report.crashes + self.report.faults
        plan = next(plans, None)
        while plan is not None and not self.report.failures:
            life = self.folder / "life"
            finished = False
            while not finished and not self.report.failures:
                attempt = self.attempts.start(life, plan)
                finished = self.note(attempt, plan)
                plan = next(plans, None) if attempt.hit or finished else plan
                if self.report.crashes + self.report.faults >= hits:
                    plan = None
            self.compare(life)

    def note(self, attempt: Attempt, plan: Plan | None) -> bool:
        """Remember how one attempt ended; whether the training has come to its end."""
        self.report.starts += 1
        if attempt.hit and plan is not None:
            if plan.kind == "fail":
                self.report.faults += 1
            else:
                self.report.crashes += 1
                count(self.report.phases, attempt.phase)
                count(self.report.victims, "supervisor" if plan.victim == RANKS else f"rank {plan.victim}")
        if attempt.code == 0:
            return True
        if plan is not None and plan.kind == "fail" and attempt.hit:
            self.expect_error(attempt, FAULTS[plan.error])
        elif not attempt.hit:
            self.report.failures.append(f"{plan}: exit code {attempt.code}\n{attempt.output}")
        return False

    def expect_error(self, attempt: Attempt, reason: str) -> None:
        """See whether a job that had to fail has said why, once."""
        lines = [
            line for line in attempt.output.splitlines() if "CheckpointError: " in line and reason in line
        ]
        self.report.errors += lines[-1:]
        if attempt.code == 0 or not lines:
            self.report.failures.append(
                f"no clear error ({reason}), exit code {attempt.code}\n{attempt.output}"
            )

    def compare(self, life: Path) -> None:
        """Compare a training that has come to its end with one to which nothing was done."""
        found = left_by(life)
        self.report.trainings += 1
        self.report.complaints += found.pop("complaints", "").splitlines()
        where = [
            name for name in sorted({*self.expected, *found}) if self.expected.get(name) != found.get(name)
        ]
        for name in where:
            self.report.differ.append(
                first_difference(name, self.expected.get(name, ""), found.get(name, ""))
            )
        if where or self.report.failures:
            life.rename(self.folder / f"life-{self.report.trainings}")
        else:
            shutil.rmtree(life)
        print(self.progress(), file=sys.stderr, flush=True)

    def progress(self) -> str:
        """How far everything is, in a line."""
        report = self.report
        return (
            f"{report.crashes} kills {report.phases}, {report.faults} failed calls, {report.starts} starts, "
            f"{report.trainings} trainings, {len(report.differ)} not identical, "
            f"{len(report.complaints)} torn or lost"
        )

    def on_bad_disks(self) -> None:
        """Save to a disk that becomes full, then to one that may not be written to, then to a good one."""
        life = self.folder / "life"
        disk = life / "checkpoints"
        disk.mkdir(parents=True)
        last = checkpoints_of(self.folder / "reference" / "checkpoints")[-1]
        pages = sum(-(-file.stat().st_size // 4096) for file in (last, *last.rglob("*")) if file.is_file())
        mount("-t", "tmpfs", "-o", f"size={4 * (2 * pages + 4)}k", "tmpfs", disk)
        for option, reason in (("rw", FAULTS[errno.ENOSPC]), ("ro", FAULTS[errno.EROFS])):
            mount("-o", f"remount,{option}", disk)
            self.report.starts += 1
            self.expect_error(self.attempts.start(life), reason)
        mount("-o", "remount,rw,size=100m", disk)
        self.note(self.attempts.start(life), None)
        subprocess.run(["umount", disk], check=True)
        self.compare(life)


def mount(*arguments: Any) -> None:
    """The command of this name."""
    subprocess.run(["mount", *map(str, arguments)], check=True)


def count(what: dict[str, int], name: str) -> None:
    what[name] = what.get(name, 0) + 1


def left_by(life: Path) -> dict[str, str]:
    """What a training has left that another one has to be equal in."""
    names = ("final", *(f"log-{rank}" for rank in range(RANKS)), "complaints")
    return {name: (life / name).read_text() for name in names if (life / name).exists()}


def first_difference(name: str, expected: str, found: str) -> str:
    """Two texts, where they begin to differ."""
    lines = zip_longest(expected.splitlines(), found.splitlines())
    return next((f"{name}: {one!r}, but {other!r}" for one, other in lines if one != other), name)


def launch(strategy: str, job: Job) -> None:
    """Train on the CPU."""
    Fabric(accelerator="cpu", strategy=strategy, devices=RANKS, plugins="fork").launch(train, job)


def main(config: dict[str, Any], launch: Callable[[str, Job], None] = launch) -> dict[str, Any]:
    """Do what the config says."""
    began = time.monotonic()
    torch.set_num_threads(1)
    crashes = Crashes(partial(launch, config["strategy"]), Path(config["folder"]), config["seed"])
    crashes.run(crashes.at_random(), config["crashes"])
    if config["sweep"]:
        crashes.run(crashes.sweep(), sys.maxsize)
    crashes.run(crashes.faults(), config["faults"])
    if config["disk"]:
        crashes.on_bad_disks()
    crashes.report.seconds["everything"] = time.monotonic() - began
    return asdict(crashes.report)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
