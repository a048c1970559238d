"""The cluster environment: where the ranks of a job come from, and where they meet."""

from __future__ import annotations

from abc import abstractmethod
from datetime import timedelta

from fabric_core.contracts.part import Part
from fabric_core.contracts.store import Store
from fabric_core.errors import ConfigurationError
from fabric_core.specs import ClusterEnvironmentSpec

__all__ = ["ClusterEnvironment"]


class ClusterEnvironment(Part):
    """Tells a process who it is in a job of several processes.

    Ranks count from 0. ``world_size() == num_nodes * processes_per_node``, and on every node ``local_rank()`` runs
    from 0 to the number of its processes, exclusive.
    """

    spec_type = ClusterEnvironmentSpec

    @property
    @abstractmethod
    def creates_processes_externally(self) -> bool:
        """Whether something else has started all processes already, so that ``launch`` has nothing to do."""

    @property
    @abstractmethod
    def main_address(self) -> str:
        """Host name or IP address of global rank 0, where the ranks meet."""

    @property
    @abstractmethod
    def main_port(self) -> int:
        """TCP port on ``main_address``. The same on every rank."""

    @abstractmethod
    def world_size(self) -> int:
        """How many processes the job has in all. Called on every rank, any number of times."""

    @abstractmethod
    def global_rank(self) -> int:
        """The number of this process among all. Called on every rank, any number of times."""

    @abstractmethod
    def local_rank(self) -> int:
        """The number of this process among those of its node. Called on every rank, any number of times."""

    @abstractmethod
    def node_rank(self) -> int:
        """The number of this node. Called on every rank, any number of times."""

    @property
    def listen_fd(self) -> int | None:
        """A file descriptor that already listens at the meeting point, on global rank 0; ``None`` elsewhere.

        A starter of processes that opens the socket itself can choose a free port without a race, and bind it to
        loopback alone. The reader owns the descriptor: it is given out once.
        """
        return None

    @property
    def single_node(self) -> bool:
        """Whether every rank runs on this machine, so that nothing has to listen beyond loopback."""
        return False

    def shared_store(self, timeout: timedelta) -> Store | None:
        """Connect to a store that something else than rank 0 serves, such as the starter of the processes.

        Called on every rank, where the ranks meet. They meet in it under keys that nobody has used before, so it may
        hold anything.

        Args:
            timeout: How long to wait for the server.

        Returns:
            A ``torch.distributed.Store``, or ``None`` on every rank when rank 0 has to serve one at the main address.
        """
        return None

    @property
    def restart_count(self) -> int:
        """How often the job was started again after it had failed or was stopped: 0 the first time, or if unknown."""
        return 0

    @property
    def requeue_requested(self) -> bool:
        """Whether the cluster has told this process that it will stop the job and start it again.

        The processes may hear of it at different times; ``Fabric.preempted`` is where they agree.
        """
        return False

    def accept_requeue(self) -> None:
        """Have the job started again at `teardown`. Called on every rank, when they have agreed to end for it."""

    def join(self) -> None:
        """Begin to act for the job, such as listening for its signals. Called on every rank, once, after `validate`.

        What it begins, `teardown` ends.
        """

    def validate(self, processes_per_node: int, num_nodes: int) -> None:
        """Compare what the user asked for with what was started. Called on every rank before anything is set up.

        Args:
            processes_per_node: How many processes the plan wants on each node.
            num_nodes: How many nodes the plan wants.

        Raises:
            ConfigurationError: The numbers differ.
        """
        wanted = processes_per_node * num_nodes
        if wanted != self.world_size():
            raise ConfigurationError(
                f"The job has {self.world_size()} processes, but devices and num_nodes ask for "
                f"{processes_per_node} * {num_nodes} = {wanted}. Start {wanted} processes, or set devices and "
                f"num_nodes so that their product is {self.world_size()} (devices='auto' follows the job)."
            )
