"""Running a program of the kit on real processes, started as a user would start them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

JOB_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "FABRIC_RUN"),
)
"""What makes a process part of a job."""

MARK = "FABRIC_CONFORMANCE_JOB"
"""Carried by every process of a job, so that those that outlive it are found."""


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        code: The exit code of ``fabric run``.
        answers: What the program returned, by global rank; a rank that failed has none.
        out, err: What was printed.
        seconds: How long it took.
        left: Processes of the job that outlived it; they have been killed since.
    """

    code: int
    answers: Mapping[int, Any]
    out: str
    err: str
    seconds: float
    left: tuple[str, ...]


def run_on_ranks(
    program: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    processes: int | None = 2,
    timeout: float = 110,
    environ: Mapping[str, str] | None = None,
    **flags: str,
) -> Ended:
    """Run a program on several processes, by ``fabric run``, and wait until it ends, however it ends.

    Args:
        program: A module with ``main(arguments)``; those of the kit are in ``fabric_core.testing.programs``.
        arguments: Tensors, numbers, texts and containers of them.
        processes: How many; with 1 ``fabric run`` becomes the program. ``None`` leaves it to the program to start any.
        timeout: Seconds after which the job is killed.
        environ: Further environment variables.
        flags: Those of ``fabric run``, without their dashes (``strategy="acme"``).

    Raises:
        AssertionError: It took longer than ``timeout``.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="fabric-conformance-") as name:
        folder = Path(name)
        torch.save(dict(arguments or {}), folder / "arguments.pt")
        words = [f"--{flag.replace('_', '-')}={value}" for flag, value in flags.items()]
        words += [] if processes is None else [f"--devices={processes}"]
        command = [sys.executable, "-m", "fabric_core", "run", *words]
        command += ["-m", "fabric_core.testing.rank", str(folder), program]
        began = time.monotonic()
        code, out, err = _run(command, {**_clean(), **(environ or {}), MARK: name}, timeout)
        seconds = time.monotonic() - began
        left = end_leftovers(name)
        assert code is not None, f"{program} has not ended after {timeout} s. It printed:\n{out}\n{err}"
        answers = {
            int(file.stem.partition("-")[2]): torch.load(file, weights_only=True)
            for file in sorted(folder.glob("answer-*.pt"))
        }
    return Ended(code, answers, out, err, seconds, left)


def on_ranks(program: str, arguments: Mapping[str, Any] | None = None, **options: Any) -> list[Any]:
    """What every rank answered, in the order of ranks. Arguments as `run_on_ranks`.

    Raises:
        AssertionError: The job failed, took too long, or left processes behind.
    """
    ended = run_on_ranks(program, arguments, **options)
    assert ended.code == 0, f"{program} ended with {ended.code}. It printed:\n{ended.out}\n{ended.err}"
    assert not ended.left, f"{program} left processes behind: {', '.join(ended.left)}"
    return [ended.answers[rank] for rank in sorted(ended.answers)]


def end_leftovers(mark: str) -> tuple[str, ...]:
    """Kill what is left of a job; what there was, one text each. A process that is just ending is given a moment.

    Args:
        mark: The value of `MARK` in its environment.
    """
    import psutil

    until = time.monotonic() + 2
    while left := [process for process in psutil.process_iter(["pid", "cmdline"]) if _carries(process, mark)]:
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    told = tuple(f"{process.pid} ({' '.join(process.info['cmdline'] or ())[:200]})" for process in left)
    for process in left:
        process.kill()
    return told


def _carries(process: Any, mark: str) -> bool:
    import psutil

    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark)
    except psutil.Error:
        return False


def _clean() -> dict[str, str]:
    """The environment without what would make a process part of a job."""
    environ = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
    return {"OMP_NUM_THREADS": "1", **environ}


def _run(command: list[str], environ: Mapping[str, str], timeout: float) -> tuple[int | None, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, cwd=os.getcwd(), env=dict(environ), stdout=out, stderr=err, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout)  # and not for what it leaves behind
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        return code, _text(out), _text(err)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")
