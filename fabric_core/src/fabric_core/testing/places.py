"""Where a process is in a job, and an environment that says so and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Place"]

KEPT = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT"),
    *("LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONWARNINGS", "VIRTUAL_ENV", "OMP_NUM_THREADS"),
)
"""Variables of a process that say nothing of a job."""


@dataclass(frozen=True)
class Place:
    """One process of a job whose nodes have equally many.

    Attributes:
        node_rank: The number of its node.
        local_rank: Its number on that node.
        num_nodes: How many nodes the job has.
        processes_per_node: How many processes each of them has.
        main_address, main_port: Where the ranks are to meet, for schedulers that say so.
    """

    node_rank: int
    local_rank: int
    num_nodes: int
    processes_per_node: int
    main_address: str = "127.0.0.1"
    main_port: int = 29500

    @property
    def world_size(self) -> int:
        """How many processes the job has."""
        return self.num_nodes * self.processes_per_node

    @property
    def global_rank(self) -> int:
        """Its number where one node is filled after the other."""
        return self.node_rank * self.processes_per_node + self.local_rank


def job(num_nodes: int, processes_per_node: int, main_port: int = 29500) -> Iterator[Place]:
    """Every place of a job, node by node."""
    for node_rank in range(num_nodes):
        for local_rank in range(processes_per_node):
            yield Place(node_rank, local_rank, num_nodes, processes_per_node, main_port=main_port)


@contextmanager
def only_environment(variables: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """A context in which ``os.environ`` holds these variables, and what says nothing of a job.

    Yields:
        What it holds.
    """
    before = dict(os.environ)
    inside = {**{name: before[name] for name in KEPT if name in before}, **variables}
    os.environ.clear()
    os.environ.update(inside)
    try:
        yield inside
    finally:
        os.environ.clear()
        os.environ.update(before)


def for_all(examples: int, check: Callable[..., None], **arguments: Any) -> None:
    """Hold a property to examples that hypothesis chooses, the same ones in every run.

    Args:
        examples: How many at most.
        check: The property; it fails by raising.
        arguments: A strategy of hypothesis for each of its arguments.
    """
    from hypothesis import HealthCheck, given, settings

    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    chosen = settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=quiet
    )

    @chosen
    @given(**arguments)
    def property_holds(**drawn: Any) -> None:
        check(**drawn)

    property_holds()
