"""Figures of what a whole command costs, from its start to its end: all contenders' commands in turns."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from harness.figure import AGAIN, PLAIN, Choice, Figure, Runs, Sample
from harness.operations import ONE_THREAD, clean_environment
from harness.statistics import turns

REPORTS = "BENCHMARK_REPORTS"
"""The folder into which programs write what they have measured of themselves; see programs/report.py."""
PROGRAMS = Path(__file__).parents[1] / "programs"
_PR_SET_CHILD_SUBREAPER = 36
_LONGEST = 180.0
_ATTEMPTS = 3


@dataclass(frozen=True)
class Command:
    """What is typed.

    Attributes:
        words: Program and arguments.
        environ: Variables beside those that there are.
        waits_for: How many processes report the end of their first step, and wait until the memory of all is read.
    """

    words: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    waits_for: int = 0


Write = Callable[[str, Path], Command]
"""From a case, and a folder that lives as long as the figure, to the command."""


@dataclass(frozen=True, kw_only=True)
class Commands(Figure):
    """A figure whose contenders are commands.

    Attributes:
        contenders: By name.
        on_one_core: Whether a command stays on one core: for what has one process.
        prepare: Called once with that folder.
    """

    contenders: Mapping[str, Write]
    on_one_core: bool = True
    prepare: Callable[[Path], None] = lambda folder: None

    @property
    def names(self) -> tuple[str, ...]:
        """The contenders' names."""
        return tuple(self.contenders)

    def run(self, choice: Choice) -> Runs:
        """Measure one case after the other, and in each the contenders in turns; a first round warms up."""
        runs = {}
        with tempfile.TemporaryDirectory() as folder:
            self.prepare(Path(folder))
            for case in (case for case in self.cases if choice.takes(case)):
                names = choice.contenders(self.names, [case])
                commands = {
                    name: self.contenders[PLAIN if name == AGAIN else name](case.name, Path(folder))
                    for name in names
                }
                rounds = 1 if choice.quick else choice.rounds_of(case)
                samples: dict[str, list[Sample]] = {name: [] for name in names}
                for number, turn in enumerate(turns(names, rounds if choice.quick else rounds + 1)):
                    for name in turn:
                        sample = persistent(commands[name], self.on_one_core)
                        if number or choice.quick:
                            samples[name].append(sample)
                runs[case.name] = samples
        return runs


def persistent(command: Command, on_one_core: bool) -> Sample:
    """One run that succeeds. Ranks of any library may die at their end, once in many launches: it is run again then."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return run_command(command, on_one_core)
        except RuntimeError as failed:
            print(f"Run again, because {str(failed)[:500]}", file=sys.stderr, flush=True)
    return run_command(command, on_one_core)


def run_command(command: Command, on_one_core: bool) -> Sample:
    """One run: wall time, CPU time of all its processes, and what its programs reported.

    Where it waits, ``first_step`` is the time to the last rank's first step, and ``pss`` the memory of all then.
    """
    _adopt_orphans()
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder)
        environ = {**clean_environment(), **ONE_THREAD, **command.environ, REPORTS: folder}
        core = max(os.sched_getaffinity(0))
        before, started = _cpu_of_children(), time.monotonic()
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command.words,
                env=environ,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=(lambda: os.sched_setaffinity(0, {core})) if on_one_core else None,
                start_new_session=True,  # a command that ends its process group ends nothing else
            )
            try:
                pss = (
                    _at_first_step(process, reports, command.waits_for, started) if command.waits_for else {}
                )
                code = process.wait(_LONGEST)
                wall = time.monotonic() - started
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                _reap()
            if code:
                output.seek(0)
                raise RuntimeError(f"{' '.join(command.words)} ended with {code}:\n{output.read()[-4000:]}")
        sample = {"wall": wall, "cpu": _cpu_of_children() - before, **pss}
        for report in _reports(reports):
            sample |= {f"own_{key}": value for key, value in report.items()}
    return sample


def _at_first_step(
    process: subprocess.Popen[bytes], folder: Path, ranks: int, started: float
) -> dict[str, float]:
    """Wait until all ranks have made their first step, read the memory of all processes, and let them go on."""
    while len(reports := _reports(folder)) < ranks:
        if process.poll() is not None or time.monotonic() - started > _LONGEST:
            return {}
        time.sleep(0.01)
    sample = {
        "first_step": max(report["at"] for report in reports) - started,
        "pss": float(sum(_pss(child) for child in _descendants(os.getpid()))),
    }
    (folder / "go").touch()
    return sample


def _reports(folder: Path) -> list[dict[str, float]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def _descendants(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text(encoding="ascii").split()]
    return [each for child in children for each in (child, *_descendants(child))]


def _pss(pid: int) -> int:
    """The memory of a process in bytes, with its share of what it has in common with others."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _adopt_orphans() -> None:
    """Become the parent of processes whose own has ended, so that their time counts, too."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap() -> None:
    """Wait for what the command has left behind, and end it if it stays."""
    patience = time.monotonic() + 10
    while True:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended and time.monotonic() > patience:
            for child in _descendants(os.getpid()):
                os.kill(child, signal.SIGKILL)
        if not ended:
            time.sleep(0.01)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def python(*words: str) -> tuple[str, ...]:
    """The words that start this Python."""
    return (sys.executable, *words)


def installed_command(distribution: str, name: str, folder: Path) -> tuple[str, ...]:
    """The words that start a distribution's command.

    Two of the contenders call theirs ``fabric``, and only one file of that name can be installed; so each gets the file
    that pip would write for it, elsewhere.
    """
    found = metadata.distribution(distribution).entry_points.select(group="console_scripts", name=name)
    (point,) = found
    script = folder / f"{distribution}-{name}"
    script.write_text(
        f"import sys\nfrom {point.module} import {point.attr}\nsys.exit({point.attr}())\n", encoding="utf-8"
    )
    return python(str(script))
