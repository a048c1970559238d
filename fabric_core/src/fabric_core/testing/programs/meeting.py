"""Ranks that another starter has made meet each other where a cluster environment says."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from fabric_core.testing.programs import small_training


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train together; where no strategy does that, exchange a word through a store.

    Args:
        arguments: Those of `small_training`; and ``environment``: kind, name and options of the cluster environment.
    """
    if arguments["trains"]:
        return small_training.main({**arguments, "parts": [arguments["environment"]]})
    return _exchange(arguments["environment"])


def _exchange(part: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from fabric_core.registry import default_registry
    from fabric_core.testing.parts import made

    kind, name, options = part
    environment = made(default_registry().one(kind, name), options)
    rank, size, timeout = environment.global_rank(), environment.world_size(), timedelta(seconds=30)
    store: Any = environment.shared_store(timeout)
    if store is None:
        where = (environment.main_address, environment.main_port)
        store = TCPStore(*where, world_size=size, is_master=rank == 0, timeout=timeout)
    store.set(f"conformance/{rank}", str(rank))
    heard = [int(store.get(f"conformance/{other}")) for other in range(size)]
    store.add("conformance/left", 1)
    while rank == 0 and store.add("conformance/left", 0) < size:
        pass
    environment.teardown()
    return {"rank": (rank, environment.local_rank(), environment.node_rank(), size), "heard": heard}
