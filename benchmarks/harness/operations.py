"""Figures of what one call of something costs: each contender in processes of its own, all taking turns."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from harness.figure import AGAIN, PLAIN, Case, Choice, Figure, Runs, Sample
from harness.serving import Make, serve
from harness.statistics import turns

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PER_CALL = ("wall", "cpu", "caller", "calls")
"""The numbers of a sample that grow with the operation."""
LAUNCHED_BY = {"TORCHELASTIC_RUN_ID": "benchmark", "GROUP_RANK": "0", "ROLE_RANK": "0", "NODE_RANK": "0"}


@dataclass(frozen=True, kw_only=True)
class Operations(Figure):
    """A figure whose contenders make an operation for each case.

    Attributes:
        contenders: By name, from a case to the operation.
        ranks: How many processes make one contender. They find each other by torchrun's variables.
        together: Whether one process does all cases, where none leaves anything behind.
        trimmed: Whether memory that is free is given back before each block, so that a block needs new memory.
        counted: What is taken once, after the times: ``"count"`` and ``"grow"``.
    """

    contenders: Mapping[str, Make]
    ranks: int = 1
    together: bool = False
    trimmed: bool = False
    counted: tuple[str, ...] = ("count",)

    @property
    def names(self) -> tuple[str, ...]:
        """The contenders' names."""
        return tuple(self.contenders)

    def run(self, choice: Choice) -> Runs:
        """Measure one case after the other, and in each the contenders in turns."""
        cases = [case for case in self.cases if choice.takes(case)]
        runs: dict[str, Mapping[str, Sequence[Sample]]] = {}
        for group in [cases] if self.together or choice.quick else [[case] for case in cases]:
            with ExitStack() as stack:
                found = {
                    name: stack.enter_context(Contender(self, name, [case.name for case in group]))
                    for name in choice.contenders(self.names, group)
                }
                for contender in found.values():
                    contender.await_ready()
                for case in group:
                    runs[case.name] = self._take_turns(found, case, choice)
        return runs

    def _take_turns(
        self, found: Mapping[str, Contender], case: Case, choice: Choice
    ) -> dict[str, list[Sample]]:
        calls = choice.calls_of(case)
        once = {name: dict(contender.first[case.name]) for name, contender in found.items()}
        samples: dict[str, list[Sample]] = {name: [] for name in found}
        for contender in found.values():
            contender.ask("time", case.name, calls)  # warms up
        for turn in turns(list(found), choice.rounds_of(case)):
            for name in turn:
                samples[name].append(found[name].ask("time", case.name, calls))
        for action in self.counted:
            for name, contender in found.items():
                once[name].update(contender.ask(action, case.name, 1))
        whole = {name: [{**sample, **once[name]} for sample in each] for name, each in samples.items()}
        return {name: [_divided(sample, case.per) for sample in each] for name, each in whole.items()}

    def serve(self, name: str, cases: list[str]) -> None:
        """Be that contender's process."""
        alone = self.ranks == 1
        rank = int(os.environ["RANK"])
        cores = sorted(os.sched_getaffinity(0))
        core = cores[-1] if alone else cores[rank % len(cores)]
        serve(self.contenders[PLAIN if name == AGAIN else name], cases, core)


def _divided(sample: Sample, per: int) -> Sample:
    return {key: value / per if key in PER_CALL else value for key, value in sample.items()}


class Contender:
    """The processes of one contender, seen from outside. They live as long as its ``with`` block.

    Attributes:
        first: The CPU seconds of the first call of each case.
    """

    def __init__(self, figure: Operations, name: str, cases: Sequence[str]) -> None:
        self._figure, self._name, self._cases = figure, name, cases
        self.first: dict[str, Sample] = {}

    def __enter__(self) -> Contender:
        """Start the processes; `await_ready` waits for them."""
        self._errors: IO[str] = tempfile.TemporaryFile("w+")
        self._processes = [
            self._start(rank, port) for port in [_free_port()] for rank in range(self._figure.ranks)
        ]
        return self

    def __exit__(self, *_error: object) -> None:
        """End them, kindly at first."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self._errors.close()

    def await_ready(self) -> None:
        """Return when the processes have made their operations."""
        for case in self._cases:
            self.first[case] = self._receive()

    def ask(self, action: str, case: str, calls: int) -> Sample:
        """Let all ranks do it at the same time.

        Returns:
            The longest wall time of a rank; of everything else the mean per rank.
        """
        asked = {"do": action, "case": case, "calls": calls, "trimmed": self._figure.trimmed}
        request = json.dumps(asked) + "\n"
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(request)
            process.stdin.flush()
        return self._receive()

    def _receive(self) -> Sample:
        samples = [self._read(process) for process in self._processes]
        joint = {key: sum(sample[key] for sample in samples) / len(samples) for key in samples[0]}
        return {**joint, **({"wall": max(sample["wall"] for sample in samples)} if "wall" in joint else {})}

    def _read(self, process: subprocess.Popen[str]) -> dict[str, float]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(
                f"{self._figure.name}: {self._name} has failed:\n{self._errors.read()[-4000:]}"
            )
        sample: dict[str, float] = json.loads(line)
        return sample

    def _start(self, rank: int, port: int) -> subprocess.Popen[str]:
        ranks = self._figure.ranks
        environ = {**clean_environment(), **ONE_THREAD}
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environ |= {key: str(value) for key, value in numbers.items()}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environ |= LAUNCHED_BY if ranks > 1 else {}
        script = Path(__file__).parents[1] / f"{self._figure.name}.py"
        command = [sys.executable, str(script), "--serve", self._name, "--cases", *self._cases]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        return subprocess.Popen(command, env=environ, text=True, **pipes)


def clean_environment() -> dict[str, str]:
    """The environment without what changes how Python starts, or what a library does."""
    ours = ("PYTHON", "FABRIC_", "ACCELERATE_", "OMP_", "MKL_")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
