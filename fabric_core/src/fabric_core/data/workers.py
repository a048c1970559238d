"""What a worker process of a loader does first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from fabric_core.data.seed import seed_worker, worker_seed


@dataclass(frozen=True)
class WorkerInit:
    """A ``worker_init_fn`` around the user's own; it pickles when the user's does.

    Attributes:
        users: What the user gave, called last with the worker's number.
        seeds: Base seed, rank, and whatever else the worker's seed depends on; ``None`` leaves the seeding to
            PyTorch.
        parent_pid: The process that the worker must not outlive; ``None`` when it may.
    """

    users: Callable[[int], Any] | None
    seeds: tuple[int, ...] | None
    parent_pid: int | None

    def __call__(self, worker_id: int) -> None:
        """Called in the worker process, after PyTorch has seeded it and before it loads anything."""
        sys.excepthook = _without_lost_connections
        if self.parent_pid is not None:
            from fabric_core.data.worker_signals import leave_the_end_to_the_rank
            from fabric_core.orphans import die_with_parent

            die_with_parent(self.parent_pid)
            leave_the_end_to_the_rank()
        if self.seeds is not None:
            base_seed, rank, *more = self.seeds
            seed_worker(worker_seed(base_seed, worker_id, rank, *more))
        if self.users is not None:
            self.users(worker_id)


def _without_lost_connections(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Keep quiet when the reader of a batch is gone: that it ended is its own news to tell.

    The thread that hands out shared memory reports every lost connection through ``sys.excepthook``; what goes wrong
    in the worker itself takes another way, to the loop over the loader.
    """
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)
