"""Starting the ranks of this node as fresh interpreters that run a script or module."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from fabric_core.errors import LaunchError
from fabric_core.supervisor.children import Child
from fabric_core.supervisor.failures import error_directory
from fabric_core.supervisor.network import meeting_point
from fabric_core.supervisor.outcome import Outcome
from fabric_core.supervisor.restarts import run_attempts
from fabric_core.supervisor.variables import (
    ERROR_DIR,
    LISTEN_FD,
    MODULE_FLAG,
    RESTARTS,
    SUPERVISOR_PID,
    rank_variables,
)
from fabric_core.supervisor.watch import grace_seconds, supervise

DEFAULT_MAIN_PORT = 29500
"""Where global rank 0 listens in a job of several nodes, which cannot ask each other before they have met."""


@dataclass(frozen=True)
class RankCommand:
    """The program that every rank runs.

    Attributes:
        target: The path of a script (or of a folder or archive with a ``__main__``), or the name of a module.
        is_module: Whether ``target`` is the name of a module, as after ``python -m``.
        args: What the program finds in ``sys.argv[1:]``.
    """

    target: str
    is_module: bool = False
    args: tuple[str, ...] = ()

    def check(self) -> None:
        """Find out before anything is started whether there is a script to run.

        Raises:
            LaunchError: There is none.
        """
        if not self.is_module and not os.path.exists(self.target):
            raise LaunchError(
                f"There is no script {self.target!r} in {os.getcwd()}. "
                "Give the path of a file, or -m and the name of a module."
            )

    def argv(self) -> list[str]:
        """The command line of a rank, with the interpreter's flags of this process (``-O``, ``-W``, ``-X`` …)."""
        if not sys.executable:
            raise LaunchError(
                "Python does not know its own executable here, so no further process can be started."
            )
        flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        if getattr(sys.stdout, "write_through", False):
            flags.append("-u")
        module = [MODULE_FLAG] if self.is_module else []
        return [sys.executable, *flags, "-m", "fabric_core.rank", *module, self.target, *self.args]


def current_command() -> RankCommand:
    """The program that is running now, so that it can be started again.

    Raises:
        LaunchError: This is an interactive session, or code that came from no file.
    """
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    args = tuple(sys.argv[1:])
    if spec is not None and spec.name != "__main__":
        return RankCommand(spec.name.removesuffix(".__main__"), True, args)
    if spec is not None:
        return RankCommand(sys.argv[0], False, args)
    if file is None or not os.path.exists(file):
        raise LaunchError(
            "The running program cannot be started again, because it is no script: this is an interactive "
            "session, a notebook, or code given by -c. Put it into a file, or choose a launcher that forks."
        )
    # The path as it was typed, unless the program has changed its folder or its arguments since.
    typed = os.path.abspath(sys.argv[0]) == os.path.abspath(file)
    return RankCommand(sys.argv[0] if typed else file, False, args)


def run_ranks(
    command: RankCommand,
    *,
    num_processes: int,
    node_rank: int = 0,
    num_nodes: int = 1,
    main_address: str = "127.0.0.1",
    main_port: int | None = None,
    env: Mapping[str, str] | None = None,
    grace: float | str | None = None,
    max_restarts: int = 0,
) -> int:
    """Run a program on every rank of this node and wait for all of them. Called once per node, in the parent.

    On the node of global rank 0 the port is opened before any process is started, on ``main_address`` alone,
    and handed to global rank 0 as the file descriptor ``FABRIC_LISTEN_FD``. The environment of the caller is
    not changed.

    Args:
        command: What to run.
        num_processes: How many ranks this node has.
        node_rank: The number of this node.
        num_nodes: How many nodes there are, each with ``num_processes`` ranks.
        main_address: Where global rank 0 is; as seen from all nodes.
        main_port: Where it listens. Default: any free port on a single node, 29500 on several.
        env: More environment variables for the ranks.
        grace: Seconds between SIGTERM and SIGKILL (default: ``FABRIC_GRACE_SECONDS``, else 30).
        max_restarts: How often all ranks are started again when one has failed; see `restarts`. Each time they meet
            anew, and find the number of restarts in ``FABRIC_RESTARTS``.

    Returns:
        The exit code: that of the first failing rank (128 + N when signal N ended it), 75 when the ranks agreed to
        stop before the end, and did, 128 + N when signal N ended this process, else 0. What went wrong has been
        written to ``sys.stderr``.

    Raises:
        LaunchError: Nothing was started: no such script, a port that is taken, numbers that make no sense.
    """
    _check_numbers(num_processes, node_rank, num_nodes, main_port)
    _check_restarts(max_restarts, num_nodes)
    command.check()
    seconds = grace_seconds(grace)
    _open_standard_streams()

    attempt = partial(
        _run_once,
        command,
        num_processes=num_processes,
        node_rank=node_rank,
        num_nodes=num_nodes,
        main_address=main_address,
        main_port=main_port if main_port is not None or num_nodes == 1 else DEFAULT_MAIN_PORT,
        env=env or {},
        grace=seconds,
    )
    return run_attempts(attempt, max_restarts).exit_code


def _run_once(
    command: RankCommand,
    restarts: int,
    *,
    num_processes: int,
    node_rank: int,
    num_nodes: int,
    main_address: str,
    main_port: int | None,
    env: Mapping[str, str],
    grace: float,
) -> Outcome:
    """Start the ranks and wait for their end. They meet where no earlier ones have met."""
    listener = _listener(main_address, main_port, num_nodes) if node_rank == 0 else None
    port = main_port if listener is None else listener.getsockname()[1]
    assert port is not None, "a single node always listens"
    environ = {**os.environ, **env, RESTARTS: str(restarts), SUPERVISOR_PID: str(os.getpid())}
    environ.pop(LISTEN_FD, None)
    with error_directory() as error_dir:
        environ[ERROR_DIR] = error_dir
        variables = [
            rank_variables(
                local_rank,
                num_processes=num_processes,
                main_port=port,
                main_address=main_address,
                node_rank=node_rank,
                num_nodes=num_nodes,
                environ=environ,
            )
            for local_rank in range(num_processes)
        ]
        ranks = _start(command.argv(), [{**environ, **own} for own in variables], listener)
        return supervise(ranks, error_dir=error_dir, grace=grace)


def _start(
    argv: list[str], environments: list[dict[str, str]], listener: socket.socket | None
) -> Iterator[tuple[int, Child]]:
    """Start one process per environment; the first gets the listening socket, which is then closed here.

    The first alone reads the standard input too: what is typed or piped in would go to whoever asks first.
    """
    fds: tuple[int, ...] = ()
    if listener is not None and os.name == "posix":
        fds = (listener.fileno(),)
        environments[0][LISTEN_FD] = str(listener.fileno())
    try:
        for environment in environments:
            stdin = None if environment is environments[0] else subprocess.DEVNULL
            yield (
                int(environment["RANK"]),
                subprocess.Popen(argv, env=environment, pass_fds=fds, stdin=stdin),
            )
            fds = ()
    finally:
        if listener is not None:
            listener.close()


def _open_standard_streams() -> None:
    """Put the null device where a standard stream was closed (``<&-``): the next socket would take its place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _listener(address: str, port: int | None, num_nodes: int) -> socket.socket | None:
    listener = meeting_point(address, port, single_node=num_nodes == 1)
    if listener is None and num_nodes == 1:
        raise LaunchError(
            f"The main address {address} does not belong to this machine, and there is only one node. "
            "Leave main_address (--main-address) out, or set num_nodes (--num-nodes) and node_rank (--node-rank)."
        )
    return listener


def _check_restarts(max_restarts: int, num_nodes: int) -> None:
    if max_restarts < 0:
        raise LaunchError(f"The ranks cannot be started again {max_restarts} times: give 0 or more.")
    if max_restarts and num_nodes > 1:
        raise LaunchError(
            f"Cannot start the ranks of {num_nodes} nodes again: every node is watched on its own, and all would have "
            "to start again together. Leave max_restarts (--max-restarts) out and start the script with torchrun "
            "--max-restarts on each node, or have the cluster start the whole job again."
        )


def _check_numbers(num_processes: int, node_rank: int, num_nodes: int, main_port: int | None) -> None:
    if num_processes < 1 or num_nodes < 1:
        raise LaunchError(
            f"Cannot start {num_processes} processes on {num_nodes} nodes: both must be 1 or more."
        )
    if not 0 <= node_rank < num_nodes:
        raise LaunchError(
            f"The node rank is {node_rank}, but with {num_nodes} nodes it must be 0 to {num_nodes - 1}."
        )
    if main_port is not None and not 1 <= main_port <= 65535:
        raise LaunchError(
            f"The main port is {main_port}, but must be from 1 to 65535. Leave it out for a free one."
        )
