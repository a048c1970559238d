"""The environment variables of a rank."""

from __future__ import annotations

import os
from collections.abc import Mapping

LAUNCHED = "FABRIC_LAUNCHED"
ERROR_DIR = "FABRIC_ERROR_DIR"
"""Holds the folder in which a rank leaves word of why it failed."""
LISTEN_FD = "FABRIC_LISTEN_FD"
"""Holds the number of the socket that is open already at the meeting point; for global rank 0 alone."""
MEETING_PORT = "FABRIC_MEETING_PORT"
"""Holds the port of that socket, for every rank, where ``MASTER_PORT`` is kept free for whoever meets without us."""
RESTARTS = "FABRIC_RESTARTS"
"""Holds how often the ranks were started again after a failure."""
SUPERVISOR_PID = "FABRIC_SUPERVISOR_PID"
WARM_FD = "FABRIC_WARM_FD"
"""Holds the number of the socket over which a process is told to warm up, and to be copied, rather than to run."""

MODULE_FLAG = "--module"


def rank_variables(
    local_rank: int,
    *,
    num_processes: int,
    main_port: int,
    main_address: str = "127.0.0.1",
    node_rank: int = 0,
    num_nodes: int = 1,
    meeting_port: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """What the processes that we start find in their environment; the meaning is torchrun's.

    ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``LOCAL_WORLD_SIZE``, ``NODE_RANK``, ``GROUP_RANK`` (the same),
    ``MASTER_ADDR``, ``MASTER_PORT``, ``FABRIC_MEETING_PORT``, ``FABRIC_LAUNCHED``, and ``OMP_NUM_THREADS``: the user's,
    or else the processors that this process may use, shared among the ranks of the node.

    Args:
        local_rank: The number of the process on its node.
        num_processes: How many processes each node has.
        main_port: Where global rank 0 listens.
        main_address: Where global rank 0 is.
        node_rank: The number of the node.
        num_nodes: How many nodes there are.
        meeting_port: Where it listens for a ``Fabric``, if at another port than for ``init_process_group("env://")``.
        environ: Where to look for the user's settings (default: ``os.environ``). It is not changed.
    """
    environ = os.environ if environ is None else environ
    return {
        "RANK": str(node_rank * num_processes + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(num_nodes * num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "NODE_RANK": str(node_rank),
        "GROUP_RANK": str(node_rank),
        "MASTER_ADDR": main_address,
        "MASTER_PORT": str(main_port),
        MEETING_PORT: str(main_port if meeting_port is None else meeting_port),
        "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS") or str(max(1, _usable_cpus() // num_processes)),
        LAUNCHED: "1",
    }


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
