"""The warm process: it does once what every rank would do first, and is then copied for each of them.

A copy becomes the child of the supervisor, by losing the process in between that has forked it. So the supervisor knows
it as well as a process that it has started itself, and the warm process may end before it does.
"""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from fabric_core.orphans import die_with_parent
from fabric_core.supervisor.messages import receive, send
from fabric_core.supervisor.variables import LISTEN_FD, SUPERVISOR_PID, WARM_FD

_TASKS = "/proc/self/task"


def become_copies() -> None:
    """Warm this process as the supervisor says; return in every copy of it that is to be a rank, and only there.

    Called first of all in a process that the supervisor has started for this. The process ends with the supervisor, or
    when that closes the channel.
    """
    __tracebackhide__ = True
    die_with_parent(int(os.environ[SUPERVISOR_PID]))
    with socket.socket(fileno=int(os.environ.pop(WARM_FD))) as channel:
        channel.set_inheritable(False)
        order, _ = receive(channel)
        before = dict(os.environ)
        if order is not None:
            send(channel, {"hazard": _warm_up(order["steps"], order["folder"])})
        after = dict(os.environ)
        while order is not None:
            order, descriptors = receive(channel)
            if order is None:
                break
            try:
                pid = _fork_orphan()
            except OSError as error:
                send(channel, {"error": str(error)})
                continue
            if pid == 0:
                _take_over(order, descriptors)
                _change_variables(before, after)
                return
            send(channel, {"pid": pid})
            for descriptor in descriptors:
                os.close(descriptor)
    os._exit(0)


# -- before the first copy ---------------------------------------------------------------------------------------------


def _warm_up(steps: Iterable[str], folder: str) -> str:
    """Import modules and call functions; what speaks against copying this process then, empty when nothing does."""
    gc.disable()  # nothing of this is garbage, and a collection writes into every page that copies could share
    own = [] if getattr(sys.flags, "safe_path", sys.flags.isolated) else [folder]
    sys.path[:0] = own  # a module there that hides another one is to hide it here, too
    try:
        for step in steps:
            module, _, function = step.partition(":")
            found = importlib.import_module(module)
            if function:
                getattr(found, function)()
    except BaseException as error:
        return f"{step} fails: {type(error).__name__}: {error}"
    finally:
        for folder in own:
            sys.path.remove(folder)
    hazard = _hazard()
    gc.freeze()
    return hazard


def _hazard() -> str:
    """Threads, which a copy lacks, and devices in use, which break in one."""
    _fork_in_vain()  # libraries that know of forks end their threads before one
    threads = len(os.listdir(_TASKS)) - 1
    if threads:
        return f"{threads} more thread(s) run after the imports"
    device = _device_in_use()
    return f"the device {device!r} is in use after the imports" if device else ""


def _fork_in_vain() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _device_in_use() -> str:
    """The type of PyTorch's accelerator, if this process has initialised it. Asking does not do so."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return ""
    try:
        current = torch.accelerator.current_accelerator()
    except RuntimeError:  # PyTorch 2.6, where there is none
        return ""
    module = None if current is None else torch.get_device_module(current)
    is_initialized = getattr(module, "is_initialized", None)
    return str(current.type) if is_initialized is not None and is_initialized() else ""


# -- a copy ------------------------------------------------------------------------------------------------------------


def _fork_orphan() -> int:
    """Fork a process whose parent is not this one, but whoever adopts orphans; 0 there, and its pid here.

    Raises:
        OSError: There can be no more processes.
    """
    reading, writing = os.pipe()
    middle = os.fork()
    if middle == 0:
        middle = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            os._exit(error.errno or 1)
        if pid:
            os.write(writing, str(pid).encode())
            os._exit(0)
        os.close(reading)
        os.close(writing)
        while os.getppid() == middle:
            time.sleep(0.0005)
        return 0
    os.close(writing)
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(middle, 0)[1])
        if code:
            raise OSError(abs(code), os.strerror(abs(code)))
        return int(os.read(reading, 32))
    finally:
        os.close(reading)


def _take_over(order: Mapping[str, Any], descriptors: list[int]) -> None:
    """Give this copy what a fresh process of a rank would have been given."""
    os.environ.clear()
    os.environ.update(order["environ"])
    for descriptor in descriptors:
        os.environ[LISTEN_FD] = str(descriptor)
    if not order["reads"]:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)
    _seed_anew()
    gc.enable()


def _change_variables(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Change what the imports have changed in the environment of the warm process."""
    os.environ.update({name: value for name, value in after.items() if before.get(name) != value})
    for name in before.keys() - after.keys():
        os.environ.pop(name, None)


def _seed_anew() -> None:
    """Every fork seeds Python's own random numbers. These are seeded by chance in a fresh process, and only there."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "default_generator"):
        torch.default_generator.seed()
    numpy_random: Any = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
