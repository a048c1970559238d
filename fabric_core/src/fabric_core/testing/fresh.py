"""Fresh processes: for what can only be seen in one, and for jobs that another scheduler starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fabric_core.testing.places import KEPT
from fabric_core.testing.ranks import JOB_VARIABLES, MARK, end_leftovers

ANSWER = "conformance answer: "
"""How the line begins in which a fresh interpreter answers."""

AT_FIRST = dict(os.environ)
"""What this process has found in its environment, before it has imported a plugin."""


def environment_without_a_job(others: Mapping[str, str]) -> dict[str, str]:
    """The environment variables, without what would make a process part of a job, and with others over them."""
    environ = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
    return {"OMP_NUM_THREADS": "1", **environ, **others}


def ask(code: str, *arguments: str, environ: Mapping[str, str] | None = None, timeout: float = 110) -> Any:
    """Run code in a fresh interpreter; what it passes to ``answer(…)``, as JSON knows it.

    It does not see variables that a plugin has set here meanwhile, so that the same can be found out anew.

    Args:
        code: Python, which finds its arguments in ``sys.argv[1:]``.
        arguments: Texts.
        environ: Further environment variables.
        timeout: Seconds.

    Raises:
        AssertionError: It failed, took too long, or did not answer.
    """
    prelude = f"import json, sys\ndef answer(value): print({ANSWER!r} + json.dumps(value), flush=True)\n"
    command = [sys.executable, "-c", prelude + code, *arguments]
    try:
        ended = subprocess.run(
            command,
            env={**_at_first(), **(environ or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"a fresh process has not ended after {timeout} s:\n{error.stderr!r}") from error
    answers = [line.removeprefix(ANSWER) for line in ended.stdout.splitlines() if line.startswith(ANSWER)]
    assert ended.returncode == 0, f"a fresh process ended with {ended.returncode}:\n{ended.stderr}"
    assert answers, f"a fresh process did not answer:\n{ended.stderr}"
    return json.loads(answers[-1])


def _at_first() -> dict[str, str]:
    now = environment_without_a_job({})
    return {name: value for name, value in now.items() if name in AT_FIRST or name in KEPT}


def run_side_by_side(
    program: str,
    arguments: Mapping[str, Any],
    environs: Sequence[Mapping[str, str]],
    timeout: float = 60,
) -> list[Any]:
    """Run a program in one process per environment, all at the same time, as a scheduler would.

    Args:
        program: A module with ``main(arguments)``.
        arguments: Tensors, numbers, texts and containers of them.
        environs: What each process finds in its environment variables, beside what it needs to run at all.
        timeout: Seconds after which all of them are killed.

    Returns:
        What each answered, in the order of ``environs``.

    Raises:
        AssertionError: One failed, took too long, or left processes behind.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="fabric-conformance-") as name:
        folders = [Path(name, str(number)) for number in range(len(environs))]
        processes = []
        for folder, environ in zip(folders, environs, strict=True):
            folder.mkdir()
            torch.save(dict(arguments), folder / "arguments.pt")
            processes.append(_start(folder, program, {**environ, MARK: name}))
        late = not _all_ended(processes, time.monotonic() + timeout)
        for process in processes:
            if process.poll() is None:
                process.kill()
        told = "\n".join(_told(folder, process) for folder, process in zip(folders, processes, strict=True))
        left = end_leftovers(name)
        assert not late, f"{program} has not ended after {timeout} s on every process.\n{told}"
        assert not any(process.returncode for process in processes), f"{program} failed.\n{told}"
        assert not left, f"{program} left processes behind: {', '.join(left)}"
        return [torch.load(next(folder.glob("answer-*.pt")), weights_only=True) for folder in folders]


def _start(folder: Path, program: str, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with (folder / "out").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "fabric_core.testing.rank", str(folder), program],
            env={"OMP_NUM_THREADS": "1", **environ},
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _all_ended(processes: Sequence[subprocess.Popen[bytes]], until: float) -> bool:
    """Wait for all, or until one has failed: the others would wait for it."""
    while any(process.poll() is None for process in processes):
        if time.monotonic() > until:
            return False
        if any(process.poll() for process in processes):
            time.sleep(1)  # let the others tell what they saw
            return True
        time.sleep(0.02)
    return True


def _told(folder: Path, process: subprocess.Popen[bytes]) -> str:
    process.wait()
    text = (folder / "out").read_text(encoding="utf-8", errors="replace")
    return f"Process {folder.name} ended with {process.returncode} and printed:\n{text}"
