"""Who is on which node, asked of all ranks through mpi4py."""

from __future__ import annotations

import atexit
import socket
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fabric_core.errors import ConfigurationError

_ADVICE = "Set MASTER_ADDR to the host of rank 0 on every rank"


@dataclass(frozen=True)
class Census:
    """The hosts of all ranks, as seen by one of them.

    Attributes:
        rank: The global rank of this process.
        hosts: One host name per rank, in the order of the ranks.
    """

    rank: int
    hosts: tuple[str, ...]

    @property
    def node_rank(self) -> int:
        """The number of this host, in the order in which hosts appear first."""
        return list(dict.fromkeys(self.hosts)).index(self.hosts[self.rank])

    @property
    def local_rank(self) -> int:
        """How many lower ranks this host has."""
        return self.hosts[: self.rank].count(self.hosts[self.rank])

    @property
    def local_size(self) -> int:
        """How many ranks this host has."""
        return self.hosts.count(self.hosts[self.rank])


def take_census(rank: int, world_size: int, libraries: Collection[str]) -> Census:
    """Ask every rank for its host. Called on every rank; initialises MPI where nobody has.

    Args:
        rank, world_size: What the launcher says.
        libraries: How the MPI libraries that understand the launcher call themselves; empty when unknown.

    Raises:
        ConfigurationError: mpi4py is not installed, or belongs to another MPI than the launcher.
    """
    mpi = _initialised(libraries)
    world = mpi.COMM_WORLD
    if (world.rank, world.size) != (rank, world_size):
        raise _of_another_mpi(
            mpi, f"says that this is rank {rank} of {world_size}, not {world.rank} of {world.size}"
        )
    return Census(rank, tuple(world.allgather(socket.gethostname())))


def _initialised(libraries: Collection[str]) -> Any:
    """The module of mpi4py. A library that the launcher does not speak to ends the process when it is initialised."""
    try:
        import mpi4py

        on_import, mpi4py.rc.initialize = mpi4py.rc.initialize, False
        try:
            from mpi4py import MPI
        finally:
            mpi4py.rc.initialize = on_import
    except (ImportError, RuntimeError) as error:
        raise ConfigurationError(
            "The variables of the MPI launcher do not say on which nodes the ranks are, and mpi4py cannot be asked "
            f"({error}). {_ADVICE}, or install mpi4py: pip install mpi4py."
        ) from error
    if MPI.Is_initialized():
        return MPI
    if libraries and not any(name in MPI.Get_library_version() for name in libraries):
        raise _of_another_mpi(MPI, f"works with {' or '.join(libraries)}")
    mpi4py.rc.finalize = True
    MPI.Init_thread()
    atexit.register(_end_after_failure, MPI.COMM_WORLD)
    return MPI


def _end_after_failure(world: Any) -> None:
    """MPI ends in an orderly way only when every rank does; after an error the others would be waited for."""
    if getattr(sys, "last_value", None) is not None:
        world.Abort(1)


def _of_another_mpi(mpi: Any, why: str) -> ConfigurationError:
    library = mpi.Get_library_version().splitlines()[0].partition(",")[0].strip()
    return ConfigurationError(
        f"The MPI launcher {why}, but mpi4py was built for, or has found, another MPI ({library}). Start the script "
        f"with the launcher of that MPI, or install mpi4py for this one. {_ADVICE}, to do without mpi4py."
    )
