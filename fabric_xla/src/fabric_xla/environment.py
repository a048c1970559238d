"""The environment of processes that torch_xla has started: ranks are what the device says."""

from __future__ import annotations

import os

from fabric_core.contracts.cluster_environment import ClusterEnvironment
from fabric_core.supervisor import DEFAULT_MAIN_PORT
from fabric_xla.hooks import ENVIRONMENT
from fabric_xla.places import port_of
from fabric_xla.probes import LOCAL_RANK


class XLAEnvironment(ClusterEnvironment):
    """Ranks from torch_xla's runtime, which knows them in processes that ``torch_xla.launch`` has started.

    Elsewhere, this process is the only one. Asking for a rank initialises the device.
    """

    spec = ENVIRONMENT

    @property
    def creates_processes_externally(self) -> bool:
        """Whether torch_xla has started this process."""
        return LOCAL_RANK in os.environ

    @property
    def main_address(self) -> str:
        """``MASTER_ADDR``, or what torch_xla finds out about the machine of rank 0."""
        address = os.environ.get("MASTER_ADDR")
        if address is not None:
            return address
        if self._is_single_node():
            return "127.0.0.1"
        import torch_xla.runtime as xr

        return str(xr.get_master_ip())

    @property
    def main_port(self) -> int:
        """``MASTER_PORT``, or the usual one.

        Raises:
            ConfigurationError: It is no port.
        """
        return port_of(os.environ, DEFAULT_MAIN_PORT)

    @property
    def single_node(self) -> bool:
        """Whether every process runs on this machine."""
        return self._is_single_node()

    def world_size(self) -> int:
        """How many devices take part, each with a process."""
        return self._of_runtime("world_size", 1)

    def global_rank(self) -> int:
        """The number of this process's device; those of one machine need not follow each other."""
        return self._of_runtime("global_ordinal", 0)

    def local_rank(self) -> int:
        """The number of this process's device on this machine."""
        return self._of_runtime("local_ordinal", 0)

    def node_rank(self) -> int:
        """The number of this machine."""
        return self._of_runtime("host_index", 0)

    def _is_single_node(self) -> bool:
        return self.world_size() == self._of_runtime("local_device_count", 1)

    def _of_runtime(self, question: str, otherwise: int) -> int:
        if not self.creates_processes_externally:
            return otherwise
        import torch_xla.runtime as xr

        return int(getattr(xr, question)())
