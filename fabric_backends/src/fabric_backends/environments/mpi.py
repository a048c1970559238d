"""Processes that mpirun or mpiexec has started. Neither PyTorch nor MPI is imported before it is needed.

MPI is initialised only where the launcher's variables leave something open: who is on which node.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from fabric_backends.environments.census import Census, take_census
from fabric_backends.environments.started import StartedEnvironment
from fabric_backends.environments.variables import Variables, fewer_visible, of_equal_nodes, port_of, whole
from fabric_backends.hooks import MPI
from fabric_core.errors import ConfigurationError
from fabric_core.specs import Detection

_PORT = 29500  # PyTorch's own default, where nothing tells one job from another

_variables = Variables("mpi", "Start the script with mpirun or mpiexec, which set it", "The MPI launcher")


@dataclass(frozen=True)
class Launcher:
    """How a family of MPI launchers tells a process who it is.

    Attributes:
        name: What people call it.
        rank, size: Variables of the global rank and of the number of ranks.
        local_rank, local_size: The same within a node; ``None`` where it does not tell.
        libraries: How the MPI libraries that go with it call themselves.
        mark: The variable that it is known by; by default the first.
    """

    name: str
    rank: str
    size: str
    local_rank: str | None = None
    local_size: str | None = None
    libraries: tuple[str, ...] = ()
    mark: str = ""

    def started(self, environ: Mapping[str, str]) -> bool:
        """Whether it has started this process."""
        return (self.mark or self.rank) in environ


LAUNCHERS = (
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("Open MPI", "Spectrum MPI"),
    ),
    Launcher(
        "MVAPICH",
        "MVP_COMM_WORLD_RANK",
        "MVP_COMM_WORLD_SIZE",
        "MVP_COMM_WORLD_LOCAL_RANK",
        "MVP_COMM_WORLD_LOCAL_SIZE",
        ("MVAPICH",),
    ),
    Launcher(
        "MVAPICH2",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        ("MVAPICH",),
    ),
    Launcher(
        "MPICH or Intel MPI",
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
        ("MPICH", "Intel", "MVAPICH", "CRAY"),
        mark="MPI_LOCALRANKID",
    ),
)
"""Launchers that say all."""

BARE = Launcher("a launcher that speaks PMI", "PMI_RANK", "PMI_SIZE")
"""The least that there is. Other starters than those of MPI set these two as well."""


def detect(environ: Mapping[str, str]) -> Detection | None:
    """Recognise a process of several that an MPI launcher has started. One that is alone needs nobody."""
    launcher = launcher_of(environ)
    if launcher is None or whole(environ, launcher.size) == 1:
        return None
    per_node = whole(environ, launcher.local_size or "")
    note = f"{launcher.name} has started this process ({launcher.mark or launcher.rank} is set)"
    own = fewer_visible(environ, than=per_node)
    return of_equal_nodes(whole(environ, launcher.size), per_node, note, own_devices=own)


def launcher_of(environ: Mapping[str, str]) -> Launcher | None:
    """Which launcher has started this process. What SLURM's srun sets does not count."""
    for launcher in LAUNCHERS:
        if launcher.started(environ):
            return launcher
    return BARE if BARE.started(environ) and "SLURM_JOB_ID" not in environ else None


class MPIEnvironment(StartedEnvironment):
    """Ranks from the variables of the MPI launcher; across nodes, what these leave open is asked of mpi4py."""

    spec = MPI

    def __init__(self) -> None:
        self._counted: Census | None = None

    @property
    def main_address(self) -> str:
        """``MASTER_ADDR``; loopback on one node; otherwise the host name of rank 0, which all ranks agree on."""
        given = os.environ.get("MASTER_ADDR")
        if given:
            return given
        return "127.0.0.1" if self.single_node else self._census().hosts[0]

    @property
    def main_port(self) -> int:
        """``MASTER_PORT``; else a number made of the job's name, or 29500 where the launcher gives it none."""
        if os.environ.get("MASTER_PORT"):
            return _variables.number("MASTER_PORT", least=1)
        job = os.environ.get("PMIX_NAMESPACE")
        return _PORT if job is None else port_of(zlib.crc32(job.encode()))

    def world_size(self) -> int:
        """From the launcher."""
        return _variables.number(_launcher().size, least=1)

    def global_rank(self) -> int:
        """From the launcher."""
        return _variables.number(_launcher().rank)

    def local_rank(self) -> int:
        """From the launcher, or from a count of who is where."""
        name = _launcher().local_rank
        return self._census().local_rank if name is None else _variables.number(name)

    def node_rank(self) -> int:
        """By count where there is one, or else by the usual order: one node is filled after the other."""
        if self.single_node:
            return 0
        if _launcher().local_rank is None or not os.environ.get("MASTER_ADDR"):
            return self._census().node_rank
        node, local_rank = divmod(self.global_rank(), self.local_size())
        if local_rank == self.local_rank():
            return node
        return self._census().node_rank

    def local_size(self) -> int:
        """From the launcher, or from a count of who is where."""
        name = _launcher().local_size
        return self._census().local_size if name is None else _variables.number(name, least=1)

    def _census(self) -> Census:
        if self._counted is None:
            self._counted = take_census(self.global_rank(), self.world_size(), _launcher().libraries)
        return self._counted


def _launcher() -> Launcher:
    launcher = launcher_of(os.environ)
    if launcher is None:
        names = ", ".join(known.rank for known in LAUNCHERS)
        raise ConfigurationError(
            f"The cluster environment 'mpi' finds no variable of an MPI launcher ({names}). Start the script with "
            "mpirun or mpiexec, or leave the cluster environment to be detected."
        )
    return launcher
