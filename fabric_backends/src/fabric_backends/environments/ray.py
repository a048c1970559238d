"""Ranks in workers of Ray: of Ray Train, or actors that were given ranks. Nothing here imports Ray or PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from fabric_backends.environments.started import EnvEnvironment
from fabric_backends.environments.variables import Variables, fewer_visible, of_equal_nodes, whole
from fabric_backends.hooks import RAY
from fabric_core.errors import ConfigurationError
from fabric_core.specs import Detection

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_WORKER = "RAY_RAYLET_PID"  # set by a raylet for the workers that it starts

_variables = Variables(
    "ray",
    "Run the function by Ray Train, or give its actors the variables of ranks_of_workers first",
    "Ray Train or ranks_of_workers",
)


def ranks_of_workers(hosts: Sequence[str], main_port: int) -> list[dict[str, str]]:
    """The environment variables that make ranks of Ray workers.

    Each worker puts its own into ``os.environ`` before it makes a ``Fabric``. The first worker becomes rank 0.

    Args:
        hosts: The address of each worker's node (``ray.util.get_node_ip_address()`` there), in any order.
        main_port: A port that is free on the node of the first worker.

    Returns:
        One dictionary per worker, in the order of ``hosts``. Ranks go from node to node.

    Raises:
        ConfigurationError: There is no worker, or the nodes have unequal numbers of them.

    Example:
        >>> [ranks["RANK"] for ranks in ranks_of_workers(["10.0.0.1", "10.0.0.2", "10.0.0.1", "10.0.0.2"], 29500)]
        ['0', '2', '1', '3']
    """
    nodes = list(dict.fromkeys(hosts))
    counts = {node: list(hosts).count(node) for node in nodes}
    if len(set(counts.values())) != 1:
        spread = ", ".join(f"{node}: {count}" for node, count in counts.items()) or "there are none"
        raise ConfigurationError(
            f"Training needs the same number of Ray workers on every node ({spread}). Reserve them together, in a "
            "placement group with one bundle per worker and the strategy STRICT_PACK, or one bundle per node."
        )
    per_node = counts[nodes[0]]
    local_ranks = [list(hosts[:index]).count(host) for index, host in enumerate(hosts)]
    return [
        {
            "RANK": str(nodes.index(host) * per_node + local_rank),
            "LOCAL_RANK": str(local_rank),
            "NODE_RANK": str(nodes.index(host)),
            "WORLD_SIZE": str(len(hosts)),
            "LOCAL_WORLD_SIZE": str(per_node),
            "MASTER_ADDR": nodes[0],
            "MASTER_PORT": str(main_port),
        }
        for host, local_rank in zip(hosts, local_ranks, strict=True)
    ]


def detect(environ: Mapping[str, str]) -> Detection | None:
    """Recognise a worker of Ray that has been given a rank. The driver, and workers without one, are on their own."""
    if _WORKER not in environ or "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    per_node = whole(environ, "LOCAL_WORLD_SIZE")
    own = fewer_visible(environ, than=per_node)
    return of_equal_nodes(
        whole(environ, "WORLD_SIZE"), per_node, "this worker of Ray has a rank", own_devices=own
    )


class RayEnvironment(EnvEnvironment):
    """Ranks from the variables that Ray Train sets, and `ranks_of_workers` names, in each worker."""

    spec = RAY
    variables = _variables

    def node_rank(self) -> int:
        """``NODE_RANK``."""
        return _variables.number("NODE_RANK")

    def shared_store(self, timeout: timedelta) -> Store | None:
        """The store at which Ray Train has made a process group, if it has: its rank 0 serves it. On every rank.

        Args:
            timeout: How long to wait for it.
        """
        from torch.distributed import TCPStore, is_initialized  # type: ignore[attr-defined]

        if not is_initialized():
            return None
        store: Store = TCPStore(self.main_address, self.main_port, timeout=timeout, wait_for_workers=False)
        return store
