"""Who is on which node, asked of all ranks through mpi4py."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from fabric_core.errors import ConfigurationError

_ADVICE = "Set MASTER_ADDR to the host of rank 0 on every rank, or install mpi4py: pip install mpi4py"


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


def take_census(rank: int, world_size: int) -> Census:
    """Ask every rank for its host. Called on every rank; initialises MPI.

    Args:
        rank, world_size: What the launcher says; MPI has to agree.

    Raises:
        ConfigurationError: mpi4py is not installed, or was built for another MPI than the launcher's.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigurationError(
            "The variables of the MPI launcher do not say on which nodes the ranks are, and mpi4py cannot be asked "
            f"({error}). {_ADVICE}."
        ) from error
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (rank, world_size):
        raise ConfigurationError(
            f"The MPI launcher says that this is rank {rank} of {world_size}, but mpi4py takes itself for rank "
            f"{world.rank} of {world.size}: it was built for another MPI ({MPI.Get_library_version().split(',')[0]}). "
            f"Install mpi4py for the MPI that starts the script. {_ADVICE.partition(', or')[0]}, to do without it."
        )
    return Census(rank, tuple(world.allgather(socket.gethostname())))
