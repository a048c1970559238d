"""The cluster environment: what the job file says, in the words of the contract."""

import os
from collections.abc import Mapping
from functools import cached_property

from fabric_acme_cluster.hooks import ACME
from fabric_acme_cluster.job import FILE, Job, read_job
from fabric_core import ClusterEnvironment, ConfigurationError, Detection


def detect(environ: Mapping[str, str]) -> Detection | None:
    """Recognise a job by its file. One that is broken is recognised, too: the first question to it says why."""
    try:
        job = read_job(environ)
    except ConfigurationError as error:
        return Detection(note=str(error)) if FILE in environ else None
    return Detection(job.processes_per_node, len(job.nodes), f"{FILE} is set")


class MyCluster(ClusterEnvironment):
    """Ranks from the job file, which is read once, when the first of them is asked for."""

    spec = ACME
    creates_processes_externally = True

    @cached_property
    def job(self) -> Job:
        """The job of this process."""
        return read_job(os.environ)

    @property
    def main_address(self) -> str:
        """The first node."""
        return self.job.nodes[0]

    @property
    def main_port(self) -> int:
        """The port that the scheduler keeps free there."""
        return self.job.port

    def world_size(self) -> int:
        """The processes of all nodes."""
        return len(self.job.nodes) * self.job.processes_per_node

    def global_rank(self) -> int:
        """The number of this process."""
        return self.job.task

    def local_rank(self) -> int:
        """Its number on its node."""
        return self.job.task % self.job.processes_per_node

    def node_rank(self) -> int:
        """The number of its node."""
        return self.job.task // self.job.processes_per_node
