"""The store of the processes that torch_xla has started: where they leave word for each other.

Which process becomes rank 0 is known to the device only, and late. So it is not rank 0 that serves the store, but the
launcher, on the first machine; only where there was no launcher of ours does rank 0 do it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fabric_core.contracts.cluster_environment import ClusterEnvironment
from fabric_core.errors import LaunchError
from fabric_core.supervisor import reserved_socket
from fabric_xla.places import Place

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

SERVED = "FABRIC_XLA_STORE"
"""The environment variable in which a launcher says that it serves the store: ``address:port``."""

_meetings = itertools.count()
"""One number per meeting of this process; all meet in the same order, so it is the same on all of them."""


@contextmanager
def meeting(place: Place) -> Iterator[Place]:
    """While this is open, the store of a job is served, if from this machine. Called by the launcher on every machine.

    Yields:
        The place, with the numbers of the ports in it.

    Raises:
        LaunchError: The port of the store is taken.
    """
    if place.number != 0:
        yield place
        return
    store: Any = serve_store(place.address, place.store_port)
    with ExitStack() as stack:
        port = place.port or stack.enter_context(reserved_socket(place.address)).getsockname()[1]
        yield replace(place, port=port, store_port=store.port)


def serve_store(address: str, port: int) -> Store:
    """Serve a store from this process as long as the result lives.

    Args:
        address: Where the processes will look for it.
        port: Likewise; 0 for any that is free.

    Raises:
        LaunchError: The port is taken.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(address, port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        raise LaunchError(
            f"The meeting point {address}:{port} cannot be opened: {error}. Set MASTER_PORT to a port that is free, as "
            "the next one has to be: there the launcher serves the store."
        ) from error


def join_store(environment: ClusterEnvironment, timeout: timedelta) -> Store:
    """Connect to the store of the job, with keys that nobody has used before. Called on every rank.

    Raises:
        LaunchError: Nobody serves it within ``timeout``.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    served = os.environ.get(SERVED, "")
    address, _, port = served.rpartition(":")
    if not served:
        address, port = environment.main_address, str(environment.main_port)
    serves = not served and environment.global_rank() == 0
    try:
        store = TCPStore(address, int(port), is_master=serves, timeout=timeout, wait_for_workers=False)
        return PrefixStore(f"fabric/{next(_meetings)}", store)
    except RuntimeError as error:
        raise LaunchError(
            f"Rank {environment.global_rank()} found no meeting point at {address}:{port} within "
            f"{timeout.total_seconds():.0f} s: {error}"
        ) from error
