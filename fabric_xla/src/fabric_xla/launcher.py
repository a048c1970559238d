"""Starting a process per XLA device: ``torch_xla.launch``, made to end like every other launch.

torch_xla starts its workers in a pool, which would wait for the others for ever when one fails. So a worker that fails
leaves word and ends at once; that breaks the pool, which then ends the others.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn
from weakref import WeakValueDictionary

import torch
import torch_xla

from fabric_core.contracts.launcher import Launcher, LaunchJob
from fabric_core.data.seed import seed_environment
from fabric_core.errors import LaunchError
from fabric_core.orphans import die_with_parent
from fabric_core.supervisor import (
    DEFAULT_MAIN_PORT,
    Failure,
    Outcome,
    error_directory,
    failed_at,
    mark_failure,
    raise_for_outcome,
    rank_variables,
    read_failure,
    strip_plumbing,
    summary_of,
    text_of,
    write_failure,
)
from fabric_xla.environment import XLAEnvironment
from fabric_xla.hooks import FORK, SPAWN
from fabric_xla.moving import on_cpu
from fabric_xla.probes import devices
from fabric_xla.store import SERVED, serve_store

RESULT = "result"


class XLALauncher(Launcher):
    """Runs a function in a process per XLA device of this machine, and returns what local rank 0 returned.

    The base of the launchers below, which say how the processes start.
    """

    start_method: ClassVar[str]
    """What ``multiprocessing`` calls it."""

    def launch(self, function: Callable[[], Any], job: LaunchJob) -> Any:
        """As the contract.

        With several machines, each runs the same program; ``MASTER_ADDR`` names the first one, where that is not known
        from the TPU. The result's tensors are on the CPU.

        Raises:
            LaunchError: The processes cannot be started, or the function or its result cannot be sent.
            RankFailedError: One of the processes failed.
        """
        there = len(devices().indices)
        if job.num_processes != there:
            raise LaunchError(
                f"torch_xla starts a process for each of the {there} device(s) of this machine, and "
                f"{job.num_processes} were asked for. Leave the launcher out for one device, which needs no process of "
                "its own."
            )
        place = this_place(job.num_nodes, os.environ)
        store = serve_store(place.address, place.port) if place.number == 0 else None
        port = place.port if store is None else store.port  # type: ignore[attr-defined]
        with error_directory() as private:
            started = Started(
                self._sent(function), private, f"{place.address}:{port}", seed_environment(), os.getpid()
            )
            try:
                torch_xla.launch(started, start_method=self.start_method)
            except BrokenProcessPool:
                raise_first_failure(private)
            except RuntimeError as error:
                raise LaunchError(
                    f"torch_xla could not start the processes: {error} Nothing may have used an XLA device before "
                    "fabric.launch(): create models and tensors in the function that is launched."
                ) from error
            return _read_result(Path(private, RESULT))

    def _sent(self, function: Callable[[], Any]) -> Any:
        """What a new process makes the function of."""
        raise NotImplementedError


class XLASpawnLauncher(XLALauncher):
    """Runs a function in fresh interpreters, to which it is sent with its arguments.

    They import the script, which has to start its work under ``if __name__ == "__main__":``.
    """

    spec = SPAWN
    start_method = "spawn"

    def _sent(self, function: Callable[[], Any]) -> Any:
        """The function as bytes, so that the tensors among its arguments are copied and not shared."""
        try:
            return Packed(pickle.dumps(function))
        except Exception as error:  # whatever pickling an object of the user's may raise
            raise LaunchError(
                f"The function and its arguments cannot be sent to new processes, because they do not pickle "
                f"({type(error).__name__}: {error}). Define the function at the top level of a module or script, or "
                "fork: plugins=['xla_fork']."
            ) from error


class XLAForkLauncher(XLALauncher):
    """Runs a function in copies of this process, in notebooks too, as long as no XLA device is in use.

    They compute on the host with one thread each, because the threads of the parent do not survive in a copy.
    """

    spec = FORK
    start_method = "fork"

    def _sent(self, function: Callable[[], Any]) -> Any:
        """A number under which the copy of this process finds the function."""
        return Inherited(function)


@dataclass
class Packed:
    """A function on its way to a process that was spawned."""

    data: bytes

    def unpack(self) -> Callable[[], Any]:
        """The function, in the new process."""
        function: Callable[[], Any] = pickle.loads(self.data)
        return function


class Inherited:
    """A function that a forked process has already; only the place where it is found travels."""

    _alive: ClassVar[WeakValueDictionary[int, Inherited]] = WeakValueDictionary()

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._alive[id(self)] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return _inherited, (id(self),)

    def unpack(self) -> Callable[[], Any]:
        """The function, in the copy."""
        torch.set_num_threads(1)
        return self._function


def _inherited(number: int) -> Inherited:
    return Inherited._alive[number]


@dataclass(frozen=True)
class Place:
    """Where this machine stands among those of the job: its number, and where they meet."""

    number: int
    address: str
    port: int


def this_place(num_nodes: int, environ: Mapping[str, str]) -> Place:
    """From the variables that a cluster sets, else from what the TPU says of itself.

    Args:
        num_nodes: How many machines the job has.
        environ: The environment variables.
    """
    if num_nodes == 1:
        return Place(0, "127.0.0.1", int(environ.get("MASTER_PORT", "0")))
    port = int(environ.get("MASTER_PORT", DEFAULT_MAIN_PORT))
    number = environ.get("NODE_RANK", environ.get("TPU_WORKER_ID"))
    names = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    address = environ.get("MASTER_ADDR", names[0])
    if number is None or not address:
        number = torch_xla.tpu.worker_id() if number is None else number
        address = address or torch_xla.tpu.get_worker_ips()[0]
    return Place(int(number), address, port)


@dataclass
class Started:
    """What runs in each of the processes. torch_xla calls it with the number of the device."""

    function: Packed | Inherited
    private: str
    store: str
    seeds: Mapping[str, str]
    parent_pid: int

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Read in the main thread of the new process, where alone it can be said that an interrupt ends it at once: what
        # is called later runs in another thread, and would never hear of it.
        self.__dict__.update(state)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __call__(self, ordinal: int) -> None:
        """Become a rank, and run the function; leave its result, or word of its failure."""
        __tracebackhide__ = True
        die_with_parent(self.parent_pid)
        try:
            environment = XLAEnvironment()
            os.environ.update(self._variables(environment))
            result = self.function.unpack()()
            if environment.local_rank() == 0 and result is not None:
                torch.save(on_cpu(result), Path(self.private, RESULT))
        except BaseException as error:
            self._fail(ordinal, error)

    def _variables(self, environment: XLAEnvironment) -> dict[str, str]:
        address, _, port = self.store.rpartition(":")
        here = environment.local_rank()
        nodes = max(1, environment.world_size() // max(1, len(devices().indices)))
        variables = rank_variables(
            here,
            num_processes=environment.world_size() // nodes,
            main_port=int(port),
            main_address=address,
            node_rank=environment.node_rank(),
            num_nodes=nodes,
        )
        return {**variables, **self.seeds, "RANK": str(environment.global_rank()), SERVED: self.store}

    def _fail(self, rank: int, error: BaseException) -> None:
        """Leave word, and end at once, so that the pool breaks."""
        mark_failure(error)
        strip_plumbing(error)
        failure = Failure(rank, 1, failed_at(error), summary_of(error), text_of(error, by_hook=False))
        write_failure(self.private, failure)
        os._exit(1)


def raise_first_failure(private: str) -> NoReturn:
    """Tell which process failed first, and how.

    Args:
        private: Where the processes leave word.

    Raises:
        RankFailedError: One has.
        LaunchError: None has, so it was ended from outside.
    """
    ranks = [int(path.name.partition("-")[2]) for path in Path(private).glob("rank-*") if not path.suffix]
    found = [read_failure(private, rank) for rank in ranks]
    failures = sorted((each for each in found if each is not None), key=lambda failure: failure.time)
    if failures:
        raise_for_outcome(Outcome(failures[0].exit_code, failures[0], tuple(failures[1:])))
    raise LaunchError(
        "A process of torch_xla ended without a word: it was killed, or the library of the device has crashed. What it "
        "printed is above. Another program may be using the device."
    )


def _read_result(path: Path) -> Any:
    return torch.load(path, weights_only=False) if path.exists() else None
