"""The processes of a launch: torch_xla's pool of them does not tell which one ended, nor how."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGTERM
from typing import Any

from fabric_core.supervisor import Failure, died_of, exit_code_of

_RANK = "pid-"  # what the files are called, in which processes leave their ranks


@contextmanager
def noted(start_method: str) -> Iterator[Sequence[BaseProcess]]:
    """While this is open, the processes that this one makes by a method of ``multiprocessing`` are in a list."""
    context: Any = multiprocessing.get_context(start_method)
    make, made = context.Process, []

    def make_and_note(*args: Any, **kwargs: Any) -> Any:
        made.append(make(*args, **kwargs))
        return made[-1]

    context.Process = make_and_note
    try:
        yield made
    finally:
        vars(context).pop("Process", None)


def tell_rank(private: str, rank: int) -> None:
    """Leave word of which rank this process is. Called in each process, before it runs anything of the user's."""
    vars(multiprocessing.get_context("fork")).pop("Process", None)  # a copy of the launcher notes nothing
    Path(private, f"{_RANK}{os.getpid()}").write_text(str(rank), encoding="utf-8")


def ended_without_word(private: str, processes: Sequence[BaseProcess]) -> list[Failure]:
    """The ranks that were killed or have crashed, which made the pool end the others.

    Args:
        private: Where processes leave word.
        processes: All of them, none of which lives any more.
    """
    failures = []
    for process in processes:
        told, status = Path(private, f"{_RANK}{process.pid}"), process.exitcode
        if status not in (None, 0, -SIGTERM) and told.exists():  # the pool ends them with that signal
            rank = int(told.read_text(encoding="utf-8"))
            failures.append(Failure(rank, exit_code_of(status), time.monotonic(), died_of(status)))
    return failures
