"""The default process group: made by the first who needs it, given back by the last.

[Note: modules before groups] A wrapper that averages gradients holds the group in C++. If it is the last to let go, it
joins the group's threads while it holds the interpreter's lock, which one of these threads may be waiting for: the
process hangs at its very end. So such wrappers are released before the group is destroyed (`Membership.guard`).
For the same reason ``torch.distributed.nn.functional`` is imported here, before there is a group: the defaults of its
arguments would capture a group that exists by then, and keep it until the process ends.

[Note: the last to let go] A group ends its threads when the last who knows it lets go. Two things must not be last:

- A thread of the group. Communication hooks are Python functions that run there, and often hold the group. It would
  join itself, and the process is aborted.
- The interpreter, as it ends. A thread of the group that wants its lock by then is killed where C++ allows no such
  thing, and the process is aborted. One wants it after each collective, to forget what the caller had there.

So whoever destroys the group outlasts all others (`_outlast_others`).
"""

from __future__ import annotations

import atexit
import gc
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # [Note: modules before groups]

from fabric_core.errors import ConfigurationError, UnsupportedError
from fabric_core.supervisor import ERROR_DIR

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_LOOPBACK_NAMES = ("lo", "lo0")
_INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"

_OWN_REFERENCES = 3  # in `_outlast_others`: its caller's, its own, and the argument of `getrefcount`
_TIME_TO_REST = 0.25  # seconds; a thread needs some microseconds, and its turn

_members: list[Membership] = []
_undo = ExitStack()


class Membership:
    """One strategy's part in the default group.

    Attributes:
        owned: Whether the group was made here. One that the user has made is used and never destroyed.
    """

    def __init__(self, owned: bool) -> None:
        self.owned = owned
        self._guarded: WeakKeyDictionary[torch.nn.Module, Callable[[Any], None]] = WeakKeyDictionary()
        self._teardown: Callable[[], Callable[[], None] | None] = _nobody
        if not _members:
            atexit.register(leave_all)
        _members.append(self)

    def guard(self, module: torch.nn.Module, release: Callable[[Any], None]) -> None:
        """Call ``release(module)`` before the group is left, if ``module`` is still there."""
        self._guarded[module] = release

    def at_exit(self, teardown: Callable[[], None]) -> None:
        """At the end of the process, when nobody has left before: have the strategy leave, if it is still there.

        Args:
            teardown: A method of the strategy that lets go of what it holds, and then leaves.
        """
        self._teardown = WeakMethod(teardown)

    def end(self) -> None:
        """Called at the end of the process."""
        teardown = self._teardown()
        if teardown is not None:
            teardown()
        self.leave()

    def afterwards(self, action: Callable[[], None]) -> None:
        """Do something once the group is destroyed, also when that is at the end of the process; last come, first done.

        For what keeps groups that were made from it alive: their threads must not outlast the interpreter.
        """
        if self.owned:
            _undo.callback(action)

    def leave(self) -> None:
        """Let go of the group; the last of its owners destroys it. Called on every rank; safe to call twice."""
        if self not in _members:
            return
        for module, release in list(self._guarded.items()):
            release(module)
        _members.remove(self)
        if not _members:
            atexit.unregister(leave_all)
        if self.owned and not any(member.owned for member in _members):
            _destroy()


def join(
    backend: str,
    store: Callable[[], Store],
    *,
    rank: int,
    world_size: int,
    device: torch.device | None,
    timeout: timedelta,
    loopback: bool = False,
) -> Membership:
    """Join the default process group, or make it when there is none. Called on every rank.

    Args:
        backend: What ``torch.distributed`` calls it.
        store: Gives a store that all ranks share and whose keys are unused. Called only when there is no group.
        rank, world_size: Who this process is.
        device: The device that a new group is bound to, current already; ``None`` for no one device.
        timeout: How long a collective may take.
        loopback: Whether all ranks are on this machine, so that nothing has to listen beyond it.

    Raises:
        ConfigurationError: There is a group already, and it is of another size.
        UnsupportedError: This PyTorch does not have the backend.
    """
    if dist.is_initialized():
        _check_same(rank, world_size)
        return Membership(owned=any(member.owned for member in _members))
    _check_backend(backend)
    hook = sys.excepthook
    if loopback:
        _stay_on_loopback()
    try:
        dist.init_process_group(
            backend,
            store=store(),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device,
        )
    except BaseException:
        _undo.close()
        raise
    if ERROR_DIR in os.environ:
        sys.excepthook = hook  # a supervisor names the rank; PyTorch would put it before every line
    else:
        _undo.callback(_put_back_hook, sys.excepthook, hook)
    return Membership(owned=True)


def leave_all() -> None:
    """End every membership. Called when the process ends."""
    for member in _members.copy():
        member.end()


def backend_for(device: torch.device, wanted: str | None) -> str:
    """The backend that was asked for, else PyTorch's own choice for the device, else gloo."""
    if wanted is not None:
        return wanted
    try:
        return dist.get_default_backend_for_device(device)
    except ValueError:
        return "gloo"


def _check_same(rank: int, world_size: int) -> None:
    there = (dist.get_rank(), dist.get_world_size())
    if there != (rank, world_size):
        raise ConfigurationError(
            f"A process group exists already, in which this is rank {there[0]} of {there[1]}, but by the flags and the "
            f"environment it is rank {rank} of {world_size}. Destroy that group first, or ask for devices and "
            "num_nodes that fit it."
        )


def _check_backend(backend: str) -> None:
    for name in (part.rpartition(":")[2] for part in backend.split(",")):
        if not dist.is_backend_available(name):
            raise UnsupportedError(
                f"The process group backend {name!r} was asked for, but PyTorch {torch.__version__} here was built "
                f"without it. Set process_group_backend to one of those that it has, such as 'gloo'."
            )


def _stay_on_loopback() -> None:
    """Make gloo's sockets, also those of groups that are made later, listen on loopback; the user's choice stays."""
    if _INTERFACE_VARIABLE in os.environ or os.name != "posix":
        return
    name = next((name for _, name in socket.if_nameindex() if name in _LOOPBACK_NAMES), None)
    if name is not None:
        os.environ[_INTERFACE_VARIABLE] = name
        _undo.callback(os.environ.pop, _INTERFACE_VARIABLE, None)


def _nobody() -> None:
    """No strategy has to do anything."""


def _put_back_hook(installed: Any, before: Any) -> None:
    if sys.excepthook is installed:
        sys.excepthook = before


def _destroy() -> None:
    try:
        if not dist.is_initialized():
            return
        group = dist.group.WORLD
        dist.destroy_process_group()
    finally:
        _undo.close()
    _outlast_others(group)


def _outlast_others(group: Any) -> None:
    """Return when nobody but the caller and this function knows a group, or when its threads have come to rest.

    Who keeps a group for good has no reason to; but a library may have it as the default of an argument.
    """
    if sys.getrefcount(group) > _OWN_REFERENCES:
        gc.collect()
    until = time.monotonic() + _TIME_TO_REST
    while sys.getrefcount(group) > _OWN_REFERENCES and time.monotonic() < until:
        time.sleep(0.001)
