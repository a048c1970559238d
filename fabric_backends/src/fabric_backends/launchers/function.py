"""Running a function in new processes, by ``multiprocessing``: spawned, or forked from this one."""

from __future__ import annotations

import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

from fabric_backends.hooks import FORK, SPAWN
from fabric_backends.launchers.cargo import Call, PackedCall, read_result, write_result
from fabric_backends.launchers.hazards import process_name, refuse_unguarded_main, refuse_unsafe_fork
from fabric_backends.launchers.nodes import Node, this_node
from fabric_backends.launchers.settings import Settings
from fabric_backends.process_group import leave_all
from fabric_core.contracts.launcher import Launcher, LaunchJob
from fabric_core.data.seed import seed_environment
from fabric_core.errors import LaunchError, listing
from fabric_core.supervisor import (
    DEFAULT_MAIN_PORT,
    ERROR_DIR,
    LISTEN_FD,
    Child,
    ProcessChild,
    enter_rank,
    error_directory,
    mark_failure,
    meeting_point,
    raise_for_outcome,
    rank_variables,
    supervise,
)


class FunctionLauncher(Launcher):
    """Runs a function in new processes and returns what local rank 0 returned.

    The base of the launchers below, which say how the processes start. One may be used any number of times in one
    program.
    """

    start_method: ClassVar[str]
    """What ``multiprocessing`` calls it."""

    def launch(self, function: Callable[[], Any], job: LaunchJob) -> Any:
        """As the contract.

        With several nodes, ``NODE_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` in the environment tell the place of
        this one. Tensors among the arguments and in the result are copied; those of the result are on the CPU.

        Raises:
            LaunchError: The processes cannot be started, or the function or its result cannot be sent.
            RankFailedError: One of the processes failed.
            KeyboardInterrupt: The user has ended them.
        """
        refuse_unguarded_main()
        context = _context(self.start_method)
        if self.start_method == "fork":
            refuse_unsafe_fork()
        node = this_node(job.num_nodes, os.environ)
        listener = _listener(node, job.num_nodes)
        port = node.main_port or DEFAULT_MAIN_PORT if listener is None else listener.getsockname()[1]
        processes: list[BaseProcess] = []
        with error_directory() as private:
            ranks = _Ranks(job, node, port, private, os.getpid(), self.start_method == "fork")
            call, settings = Call(function), Settings.of_this_process()
            starting = _start(context, ranks, call, settings, listener, processes)
            outcome = supervise(starting, error_dir=private)
            for process in processes:
                if process.exitcode is not None:
                    process.close()
            raise_for_outcome(outcome)
            return read_result(ranks.result)


class SpawnLauncher(FunctionLauncher):
    """Runs a function in fresh interpreters, to which it is sent with its arguments.

    They import the script, which has to start its work under ``if __name__ == "__main__":``.
    """

    spec = SPAWN
    start_method = "spawn"


class ForkLauncher(FunctionLauncher):
    """Runs a function in copies of this process: quick to start, in notebooks too, but not once a device is in use.

    They compute with one thread each, because the pool of threads that the parent has started does not survive in a
    copy and would be waited for in vain.
    """

    spec = FORK
    start_method = "fork"


@dataclass(frozen=True)
class _Ranks:
    """What every process of one launch has to know."""

    job: LaunchJob
    node: Node
    main_port: int
    private: str
    parent_pid: int
    forks: bool

    @property
    def result(self) -> Path:
        return Path(self.private, "result")

    def rank(self, local_rank: int) -> int:
        return self.node.rank * self.job.num_processes + local_rank

    def variables(self, local_rank: int) -> dict[str, str]:
        ranks = rank_variables(
            local_rank,
            num_processes=self.job.num_processes,
            main_port=self.main_port,
            main_address=self.node.main_address,
            node_rank=self.node.rank,
            num_nodes=self.job.num_nodes,
        )
        return {**ranks, **seed_environment(), ERROR_DIR: self.private}


# -- in the parent ----------------------------------------------------------------------------------------------------


def _start(
    context: BaseContext,
    ranks: _Ranks,
    call: Call,
    settings: Settings,
    listener: socket.socket | None,
    processes: list[BaseProcess],
) -> Iterator[tuple[int, Child]]:
    """Start one process after the other; the first gets the listening socket, which is then closed here."""
    try:
        for local_rank in range(ranks.job.num_processes):
            arguments = (ranks, local_rank, ranks.variables(local_rank), call, settings, listener)
            process: BaseProcess = context.Process(  # type: ignore[attr-defined]
                target=_run_rank, args=arguments, name=process_name(ranks.private, ranks.rank(local_rank))
            )
            with warnings.catch_warnings():
                # Newer Pythons warn of what can go wrong in a fork beside threads; refuse_unsafe_fork and _run_rank
                # see to that.
                warnings.filterwarnings("ignore", ".*multi-?threaded.*fork", DeprecationWarning)
                process.start()
            processes.append(process)
            if listener is not None:
                listener.close()
                listener = None
            yield ranks.rank(local_rank), ProcessChild(process)
    finally:
        if listener is not None:
            listener.close()


def _context(start_method: str) -> BaseContext:
    try:
        return multiprocessing.get_context(start_method)
    except ValueError:
        raise LaunchError(
            f"This system cannot start processes by {start_method!r}, only by "
            f"{listing(multiprocessing.get_all_start_methods())}. Use the strategy 'ddp' or 'ddp_spawn'."
        ) from None


def _listener(node: Node, num_nodes: int) -> socket.socket | None:
    """The socket for global rank 0, on its node; elsewhere ``None``."""
    if node.rank != 0 or os.name != "posix":
        return None
    single_node = num_nodes == 1
    port = node.main_port or (None if single_node else DEFAULT_MAIN_PORT)
    return meeting_point(node.main_address, port, single_node=single_node)


# -- in the new process -----------------------------------------------------------------------------------------------


def _run_rank(
    ranks: _Ranks,
    local_rank: int,
    variables: dict[str, str],
    call: Call | PackedCall,
    settings: Settings,
    listener: socket.socket | None,
) -> None:
    """Become a rank, and run the function."""
    __tracebackhide__ = True
    with enter_rank(ranks.rank(local_rank), ranks.private, parent_pid=ranks.parent_pid):
        os.environ.update(variables)
        if listener is not None:
            os.environ[LISTEN_FD] = str(listener.detach())
        # [Note: threads after a fork] OpenMP believes in the pool of threads that the parent has started, and would
        # wait for it for ever. With one thread, it is not asked.
        settings.apply(most_threads=1 if ranks.forks else int(variables["OMP_NUM_THREADS"]))
        function = call.unpack().function
        try:
            result = function()
        except BaseException as error:
            mark_failure(error)
            raise
        if local_rank == 0 and result is not None:
            write_result(ranks.result, result)
        leave_all()
