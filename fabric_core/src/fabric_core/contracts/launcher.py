"""The launcher: how the processes of a job come to be on this node."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fabric_core.contracts.part import Part
from fabric_core.specs import LauncherSpec

if TYPE_CHECKING:
    from fabric_core.supervisor import WarmStart

__all__ = ["LaunchJob", "Launcher"]


@dataclass(frozen=True)
class LaunchJob:
    """The size of the job that is to be started.

    Attributes:
        num_processes: How many processes to start on this node.
        num_nodes: How many nodes the job has.
        warm: What every process does first, for a launcher that can do it once and copy the process for each rank;
            ``None`` where each has to start afresh.
    """

    num_processes: int
    num_nodes: int = 1
    warm: WarmStart | None = None


class Launcher(Part):
    """Starts the processes of this node and watches over them until they end."""

    spec_type = LauncherSpec

    @abstractmethod
    def launch(self, function: Callable[[], Any], job: LaunchJob) -> Any:
        """Start ``job.num_processes`` processes in which ``function()`` runs. Called once, in the parent.

        The started processes find their ranks in the environment variables ``RANK``, ``LOCAL_RANK``,
        ``LOCAL_WORLD_SIZE``, ``NODE_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``; nothing is left in
        those of the parent. When the parent dies, they die. When one of them fails, the others are ended, and its
        traceback is what the user sees last.

        Args:
            function: What every process runs.
            job: How many of them, here and in all.

        Returns:
            What ``function`` returned on local rank 0. A launcher that starts the script again does not return in
            the parent: it ends the parent when the last process has ended.

        Raises:
            LaunchError: The processes could not be started.
            RankFailedError: One of them failed.
        """
