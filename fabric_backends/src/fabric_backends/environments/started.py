"""The base of environments in which something else has started the processes."""

from __future__ import annotations

from typing import ClassVar

from fabric_backends.environments.variables import Variables
from fabric_core.contracts.cluster_environment import ClusterEnvironment
from fabric_core.errors import ConfigurationError


class StartedEnvironment(ClusterEnvironment):
    """Processes that are there already; a subclass reads who they are."""

    @property
    def creates_processes_externally(self) -> bool:
        """Always: the processes are there."""
        return True

    def local_size(self) -> int | None:
        """How many processes this node has; ``None`` where nobody says."""
        return None

    @property
    def single_node(self) -> bool:
        """Whether this node is known to have all processes."""
        return self.local_size() == self.world_size()

    def validate(self, processes_per_node: int, num_nodes: int) -> None:
        """Compare what was started with itself, then with what the user asked for. Called on every rank.

        Raises:
            ConfigurationError: A rank is not below the number of ranks, the nodes have unequal numbers of processes,
                or the numbers differ from those asked for.
        """
        size, here = self.world_size(), self.local_size()
        self._check("global rank", self.global_rank(), size)
        if here is not None and size % here:
            raise ConfigurationError(
                f"The cluster environment {self.spec.name!r} has started {size} processes, {here} of them on this "
                "node. Training needs the same number on every node. Start as many on each."
            )
        super().validate(processes_per_node, num_nodes)
        self._check("node rank", self.node_rank(), num_nodes)
        self._check("local rank", self.local_rank(), processes_per_node)

    def _check(self, what: str, rank: int, count: int) -> None:
        if rank >= count:
            raise ConfigurationError(
                f"The cluster environment {self.spec.name!r} gives this process the {what} {rank}, but there are "
                f"{count} of them, counted from 0. Start the same number of processes on every node, and see whether "
                "something has changed the environment variables."
            )


class EnvEnvironment(StartedEnvironment):
    """Ranks from the variables that PyTorch itself reads (``env://``); a subclass says who sets them, and the node."""

    variables: ClassVar[Variables]

    @property
    def main_address(self) -> str:
        """``MASTER_ADDR``."""
        return self.variables.text("MASTER_ADDR")

    @property
    def main_port(self) -> int:
        """``MASTER_PORT``."""
        return self.variables.number("MASTER_PORT", least=1)

    def local_size(self) -> int | None:
        """``LOCAL_WORLD_SIZE``."""
        return self.variables.number("LOCAL_WORLD_SIZE", least=1)

    def world_size(self) -> int:
        """``WORLD_SIZE``."""
        return self.variables.number("WORLD_SIZE", least=1)

    def global_rank(self) -> int:
        """``RANK``."""
        return self.variables.number("RANK")

    def local_rank(self) -> int:
        """``LOCAL_RANK``."""
        return self.variables.number("LOCAL_RANK")


class PodEnvironment(EnvEnvironment):
    """Pods with one process each: a pod is a node."""

    def local_size(self) -> int | None:
        """Nobody says whether pods share a machine."""
        return None

    def local_rank(self) -> int:
        """Always 0: a pod has one process."""
        return 0

    def node_rank(self) -> int:
        """The global rank."""
        return self.global_rank()
