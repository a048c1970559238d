"""Running a function in forked processes: a launcher that returns, in which faults of such launchers can be planted."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fabric_sample.hooks import SPEC

from fabric_core import Launcher, LaunchError, LaunchJob
from fabric_core.supervisor import (
    LISTEN_FD,
    Child,
    ProcessChild,
    enter_rank,
    error_directory,
    meeting_point,
    raise_for_outcome,
    rank_variables,
    supervise,
)


class SampleLauncher(Launcher):
    """Forks this process, and returns what rank 0 returned."""

    spec = SPEC

    def launch(self, function: Callable[[], Any], job: LaunchJob) -> Any:
        """Start ``job.num_processes`` processes in which the function runs. Called in the parent."""
        listener = meeting_point("127.0.0.1", None, single_node=True)
        if job.num_nodes != 1 or listener is None:
            raise LaunchError(
                "The launcher 'sample' starts processes on one machine that has a loopback address."
            )
        processes: list[BaseProcess] = []
        with error_directory() as private, listener:
            outcome = supervise(_start(function, job, listener, private, processes), error_dir=private)
            for process in processes:
                process.join()
                process.close()
            raise_for_outcome(outcome)
            return pickle.loads(Path(private, "result").read_bytes())


def _start(
    function: Callable[[], Any],
    job: LaunchJob,
    listener: socket.socket,
    private: str,
    processes: list[BaseProcess],
) -> Iterator[tuple[int, Child]]:
    context = multiprocessing.get_context("fork")
    for rank in range(job.num_processes):
        port = listener.getsockname()[1]
        variables = rank_variables(rank, num_processes=job.num_processes, main_port=port)
        if rank == 0:
            variables[LISTEN_FD] = str(listener.fileno())
        process = context.Process(target=_run, args=(function, rank, variables, private, os.getpid()))
        process.start()
        processes.append(process)
        yield rank, ProcessChild(process)


def _run(
    function: Callable[[], Any], rank: int, variables: dict[str, str], private: str, parent: int
) -> None:
    os.environ.update(variables)
    with enter_rank(rank, private, parent_pid=parent):
        result = function()
        if rank == 0:
            Path(private, "result").write_bytes(pickle.dumps(result))
