"""Where the ranks of a job meet: a key-value store that all of them share, with keys that nobody has used before.

[Note: meeting] A store may outlive those who meet in it. An elastic agent keeps one over restarts, in which dead
processes have left their addresses; and one process may meet the same peers several times. So rank 0 thinks of a
fresh prefix for every meeting, and answers each rank's own random token with it, which no leftover can forge. It
goes on until every rank has confirmed, and can therefore name the ranks that did not come.

Who comes draws a number and writes its token under it. So rank 0 reads each token once, and asks in between for two
counters only, however many ranks there are.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist

from fabric_core.contracts.cluster_environment import ClusterEnvironment
from fabric_core.errors import LaunchError
from fabric_core.supervisor import meeting_point

if TYPE_CHECKING:
    from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
else:
    from torch.distributed import HashStore, PrefixStore, Store, TCPStore

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05  # seconds between two looks at the store

# One connection per process and meeting point, for as long as the process lives: the server on rank 0 has to be there
# for whoever meets next, and the file descriptor that it listens on is given out once.
_connections: dict[tuple[int, str, int], Store] = {}


def meet(environment: ClusterEnvironment, *, timeout: timedelta) -> Store:
    """Wait until every rank of the job is there. Called on every rank.

    Args:
        environment: Who and where the ranks are.
        timeout: How long to wait.

    Returns:
        A store that the ranks share and whose keys nobody has used.

    Raises:
        LaunchError: Some ranks did not come in time; on rank 0 the message names them.
    """
    rank, world_size = environment.global_rank(), environment.world_size()
    if world_size == 1:
        return HashStore()  # nobody to listen to
    place = f"{environment.main_address} port {environment.main_port}"
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        store = _connection(environment, timeout)
        if rank == 0:
            prefix = _welcome(store, world_size, deadline)
        else:
            prefix = _report(store, rank, timedelta(seconds=max(1.0, deadline - time.monotonic())))
    except _Absent as error:
        raise LaunchError(
            f"Rank 0 waited {_seconds(timeout)} at {place} for {world_size} ranks, but {error} did not come. "
            "See whether they were started and reach that address; init_timeout sets how long to wait."
        ) from None
    except dist.DistError as error:
        raise LaunchError(
            f"Rank {rank} could not meet rank 0 at {place} within {_seconds(timeout)} ({_first_line(error)}). "
            "See whether rank 0 was started, and whether this machine can reach that address; init_timeout sets how "
            "long to wait."
        ) from error
    return PrefixStore(prefix, store)


class _Absent(Exception):
    """Ranks that rank 0 has waited for in vain."""


def _welcome(store: Store, world_size: int, deadline: float) -> str:
    """Rank 0: give every rank the prefix, until each has confirmed."""
    prefix = f"fabric/{secrets.token_hex(8)}"
    unread: list[str] = []
    known, pause = 0, _SHORTEST_PAUSE
    while store.add(f"{prefix}/confirmed", 0) < world_size - 1:
        come = store.add(_COME, 0)
        unread += [f"{_COME}/{number}" for number in range(known + 1, come + 1)]
        known = come
        unread = _answer(store, unread, prefix)
        if time.monotonic() > deadline:
            absent = [r for r in range(1, world_size) if not store.check([f"{prefix}/confirmed/{r}"])]
            raise _Absent(f"rank{'s' if absent[1:] else ''} {', '.join(map(str, absent))}")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return prefix


def _answer(store: Store, keys: list[str], prefix: str) -> list[str]:
    """Answer the tokens under some keys. Returns the keys that somebody has drawn, and not written to yet."""
    there = keys if not keys or store.check(keys) else [key for key in keys if store.check([key])]
    every: Any = store  # PyTorch's stubs lack what many stores can do at once
    if there and every.has_extended_api():
        answers = [_answer_key(token.decode()) for token in every.multi_get(there)]
        every.multi_set(answers, [prefix] * len(answers))
    else:
        for key in there:
            store.set(_answer_key(store.get(key).decode()), prefix)
    return [] if there is keys else [key for key in keys if key not in set(there)]


def _report(store: Store, rank: int, timeout: timedelta) -> str:
    """Any other rank: ask for the prefix, and confirm it."""
    token = secrets.token_hex(8)
    store.set(f"{_COME}/{store.add(_COME, 1)}", token)
    store.wait([_answer_key(token)], timeout)
    prefix: str = store.get(_answer_key(token)).decode()
    if (
        store.add(f"{prefix}/confirmed/{rank}", 1) == 1
    ):  # else a process before this one has, of the same rank
        store.add(f"{prefix}/confirmed", 1)
    return prefix


_COME = "fabric/come"
"""The counter of those that have come, and the keys of their tokens."""


def _answer_key(token: str) -> str:
    return f"fabric/answer/{token}"


def _connection(environment: ClusterEnvironment, timeout: timedelta) -> Store:
    place = (os.getpid(), environment.main_address, environment.main_port)
    if place not in _connections:
        brought = cast("Store | None", environment.shared_store(timeout))
        _connections[place] = _tcp_store(environment, timeout) if brought is None else brought
    return _connections[place]


def _tcp_store(environment: ClusterEnvironment, timeout: timedelta) -> TCPStore:
    serves = environment.global_rank() == 0
    return TCPStore(
        environment.main_address,
        environment.main_port,
        is_master=serves,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=_listening_fd(environment) if serves else None,
    )


def _listening_fd(environment: ClusterEnvironment) -> int | None:
    """A socket that listens on the main address alone; by itself the store would listen on every interface."""
    given = environment.listen_fd
    if given is not None or os.name != "posix":
        return given
    listener = meeting_point(
        environment.main_address, environment.main_port, single_node=environment.single_node
    )
    return None if listener is None else listener.detach()


def _seconds(duration: timedelta) -> str:
    return f"{duration.total_seconds():g} s"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
