"""Starting the ranks of this node, which run a script or module, and starting them again."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial

from fabric_core.errors import LaunchError
from fabric_core.supervisor.children import Child
from fabric_core.supervisor.command import RankCommand
from fabric_core.supervisor.failures import error_directory
from fabric_core.supervisor.network import meeting_point, reserved_socket
from fabric_core.supervisor.outcome import Outcome
from fabric_core.supervisor.restarts import run_attempts
from fabric_core.supervisor.signals import Inbox
from fabric_core.supervisor.starters import FreshStarter, Starter, WarmStart, WarmStarter
from fabric_core.supervisor.variables import (
    ERROR_DIR,
    LISTEN_FD,
    RESTARTS,
    SUPERVISOR_PID,
    rank_variables,
)
from fabric_core.supervisor.watch import grace_seconds, supervise

DEFAULT_MAIN_PORT = 29500
"""Where global rank 0 listens in a job of several nodes, which cannot ask each other before they have met."""


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
    warm: WarmStart | None = None,
) -> int:
    """Run a program on every rank of this node and wait for all of them. Called once per node, in the parent.

    On the node of global rank 0 the port at which a ``Fabric`` meets the others is opened before any process is
    started, on ``main_address`` alone, and handed to global rank 0 as the file descriptor ``FABRIC_LISTEN_FD``.
    ``MASTER_PORT`` is another one, kept for programs that meet by PyTorch's own ``env://``; where a port is given, it
    is both. The environment of the caller is not changed.

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
        warm: What one process does before it is copied for every rank (see [Note: warm starts]); ``None`` for ranks
            that are started afresh.

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
    fresh = FreshStarter(command)
    with closing(fresh if warm is None else WarmStarter(command, warm, fresh)) as starter:
        attempt = partial(
            _run_once,
            starter,
            most_restarts=max_restarts,
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
    starter: Starter,
    restarts: int,
    *,
    most_restarts: int,
    num_processes: int,
    node_rank: int,
    num_nodes: int,
    main_address: str,
    main_port: int | None,
    env: Mapping[str, str],
    grace: float,
) -> Outcome:
    """Start the ranks and wait for their end. They meet where no earlier ones have met."""
    with ExitStack() as stack:
        listener = _listener(main_address, main_port, num_nodes) if node_rank == 0 else None
        if listener is not None:
            stack.enter_context(listener)
        meeting = main_port if listener is None else listener.getsockname()[1]
        assert meeting is not None, "a single node always listens"
        # A program without a Fabric has rank 0 listen by itself, which it cannot where somebody listens already.
        port = main_port or stack.enter_context(reserved_socket(main_address)).getsockname()[1]
        error_dir = stack.enter_context(error_directory())
        environ = {**os.environ, **env, RESTARTS: str(restarts), SUPERVISOR_PID: str(os.getpid())}
        environ.pop(LISTEN_FD, None)
        environ[ERROR_DIR] = error_dir
        variables = [
            rank_variables(
                local_rank,
                num_processes=num_processes,
                main_port=port,
                meeting_port=meeting,
                main_address=main_address,
                node_rank=node_rank,
                num_nodes=num_nodes,
                environ=environ,
            )
            for local_rank in range(num_processes)
        ]
        inbox = stack.enter_context(Inbox())
        ready = starter.get_ready(environ | _shared(variables), inbox)
        ranks = _start(ready, [environ | own for own in variables], listener, last=restarts == most_restarts)
        return supervise(() if inbox.tells_to_end else ranks, error_dir=error_dir, grace=grace, inbox=inbox)


def _shared(variables: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all ranks find alike."""
    first, *others = variables
    return {name: value for name, value in first.items() if all(other[name] == value for other in others)}


def _start(
    starter: Starter,
    environments: Sequence[Mapping[str, str]],
    listener: socket.socket | None,
    *,
    last: bool,
) -> Iterator[tuple[int, Child]]:
    """Start one process per environment; the first gets the listening socket, which is then closed here.

    The first alone reads the standard input too: what is typed or piped in would go to whoever asks first.
    """
    for number, environment in enumerate(environments):
        rank = starter.start(environment, listener=listener if number == 0 else None, reads=number == 0)
        if number == 0 and listener is not None:
            listener.close()
        yield int(environment["RANK"]), rank
    if last:
        starter.close()


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
