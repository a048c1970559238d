"""Where a launcher finds this node among the others, when there are several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fabric_core.errors import LaunchError


@dataclass(frozen=True)
class Node:
    """One machine of a job.

    Attributes:
        rank: Its number.
        main_address: Where global rank 0 is, as seen from all nodes.
        main_port: Where global rank 0 listens; ``None`` for the default.
    """

    rank: int = 0
    main_address: str = "127.0.0.1"
    main_port: int | None = None


def this_node(num_nodes: int, environ: Mapping[str, str]) -> Node:
    """This machine's place in a job of ``num_nodes``.

    Raises:
        LaunchError: There are several nodes, and the environment does not say which of them this is.
    """
    if num_nodes == 1:
        return Node()  # whatever a larger job around this one has set is not meant for it
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in environ]
    if missing:
        raise LaunchError(
            f"The job has {num_nodes} nodes, but {' and '.join(missing)} {'are' if missing[1:] else 'is'} not set in "
            "the environment, so this machine does not know its place. Set NODE_RANK, MASTER_ADDR and MASTER_PORT on "
            "every node, or start the script there with fabric run --node-rank … --main-address …, torchrun or srun."
        )
    try:
        port = int(environ["MASTER_PORT"]) if "MASTER_PORT" in environ else None
        return Node(int(environ["NODE_RANK"]), environ["MASTER_ADDR"], port)
    except ValueError:
        raise LaunchError(
            f"NODE_RANK={environ['NODE_RANK']!r} and MASTER_PORT={environ.get('MASTER_PORT')!r} have to be numbers."
        ) from None
