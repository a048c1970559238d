"""Starting a process per XLA device: ``torch_xla.launch``, made to end like every other launch.

torch_xla starts its workers in a pool, which would wait for the others for ever when one fails. So a worker that fails
leaves word and ends at once; that breaks the pool, which then ends the others.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
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
from fabric_xla.places import Place, this_place
from fabric_xla.probes import devices
from fabric_xla.store import SERVED, meeting
from fabric_xla.workers import ended_without_word, noted, tell_rank

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
        with error_directory() as private, meeting(this_place(job.num_nodes, os.environ)) as place:
            started = Started(self._sent(function), private, place, seed_environment(), os.getpid())
            with noted(self.start_method) as processes:
                all_ended_well = self._run(started)
            if not all_ended_well:
                raise_first_failure(private, processes)
            return _read_result(Path(private, RESULT))

    def _run(self, started: Started) -> bool:
        """Whether all processes have come to the end."""
        try:
            torch_xla.launch(started, start_method=self.start_method)
        except BrokenProcessPool:
            pass
        except RuntimeError as error:
            raise LaunchError(
                f"torch_xla could not start the processes: {error} Nothing may have used an XLA device before "
                "fabric.launch(): create models and tensors in the function that is launched."
            ) from error
        else:
            return True
        gc.collect()  # the pool and the error hold each other, and with them pipes and sockets
        return False

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


@dataclass
class Started:
    """What runs in each of the processes. torch_xla calls it with the number of the device."""

    function: Packed | Inherited
    private: str
    place: Place
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
            tell_rank(self.private, environment.global_rank())
            os.environ.update(self._variables(environment))
            result = self.function.unpack()()
            if environment.local_rank() == 0 and result is not None:
                torch.save(on_cpu(result), Path(self.private, RESULT))
        except BaseException as error:
            self._fail(ordinal, error)

    def _variables(self, environment: XLAEnvironment) -> dict[str, str]:
        here = environment.local_rank()
        nodes = max(1, environment.world_size() // max(1, len(devices().indices)))
        variables = rank_variables(
            here,
            num_processes=environment.world_size() // nodes,
            main_port=self.place.port,
            main_address=self.place.address,
            node_rank=environment.node_rank(),
            num_nodes=nodes,
        )
        return {**variables, **self.seeds, "RANK": str(environment.global_rank()), SERVED: self.place.store}

    def _fail(self, rank: int, error: BaseException) -> None:
        """Leave word, and end at once, so that the pool breaks."""
        mark_failure(error)
        strip_plumbing(error)
        failure = Failure(rank, 1, failed_at(error), summary_of(error), text_of(error, by_hook=False))
        write_failure(self.private, failure)
        os._exit(1)


def raise_first_failure(private: str, processes: Sequence[BaseProcess]) -> NoReturn:
    """Tell which process failed first, and how.

    Args:
        private: Where the processes leave word.
        processes: All of them, none of which lives any more.

    Raises:
        RankFailedError: One has.
        LaunchError: It is not known which one.
    """
    ranks = [int(path.name.partition("-")[2]) for path in Path(private).glob("rank-*") if not path.suffix]
    found = [read_failure(private, rank) for rank in ranks]
    told = sorted((each for each in found if each is not None), key=lambda failure: failure.time)
    failures = told or ended_without_word(private, processes)
    if failures:
        raise_for_outcome(Outcome(failures[0].exit_code, failures[0], tuple(failures[1:])))
    raise LaunchError(
        "A process of torch_xla ended without a word, before it was known which rank it is: it was killed, or "
        "the library of the device has crashed. What it printed is above. Another program may be using the device."
    )


def _read_result(path: Path) -> Any:
    return torch.load(path, weights_only=False) if path.exists() else None
