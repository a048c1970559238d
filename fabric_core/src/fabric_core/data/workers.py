"""What a worker process of a loader does first, and before each sample.

[Note: numbered samples] Which worker loads a sample, and what that worker has loaded before, is an accident: of the
number of workers, and of where a run was interrupted. So the random numbers of a sample follow from its number in the
order of the epoch. The number travels with the indices, since a sampler may yield the same index twice.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

from torch.utils.data import get_worker_info

from fabric_core.data.seed import mixed, seed_sample, seed_worker, worker_seed


class Numbered(NamedTuple):
    """What a sampler yields at once, on its way to a worker.

    Attributes:
        indices: The index of a sample, or a list of them.
        key: From which the seeds of this loop's samples follow.
        first: The number of the first sample in the order of the epoch.
        step: How far its next sample is from there.
    """

    indices: Any
    key: int
    first: int
    step: int


class SeededDataset:
    """The user's dataset as a worker reads it, see [Note: numbered samples].

    A dataset that loads a batch at once (``__getitems__``) is seeded once per batch.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getitem__(self, index: Any) -> Any:
        """One sample."""
        if not isinstance(index, Numbered):
            return self.inner[index]
        seed_sample(mixed(index.key, index.first))
        return self.inner[index.indices]

    def __getitems__(self, batch: Any) -> Any:
        """The samples of a batch."""
        together = getattr(self.inner, "__getitems__", None)
        if together is None:
            return list(self._one_by_one(batch))
        if isinstance(batch, Numbered):
            seed_sample(mixed(batch.key, batch.first))
            batch = batch.indices
        return together(batch)

    def _one_by_one(self, batch: Any) -> Iterator[Any]:
        if not isinstance(batch, Numbered):
            yield from (self.inner[index] for index in batch)
            return
        for number, index in enumerate(batch.indices):
            seed_sample(mixed(batch.key, batch.first + number * batch.step))
            yield self.inner[index]


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
        info: Any = get_worker_info()
        if isinstance(info.dataset, SeededDataset):
            object.__setattr__(info, "dataset", info.dataset.inner)  # past its own, which refuses
        if self.users is not None:
            self.users(worker_id)


@contextmanager
def keeping_garbage() -> Iterator[None]:
    """Let the workers that are forked in this block never collect what is garbage in this process.

    Among it may be a process group that was left. Its destructor waits for threads, which do not exist in a copy.
    """
    if gc.get_freeze_count():  # the user's own, which unfreezing would undo
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _without_lost_connections(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Keep quiet when the reader of a batch is gone: that it ended is its own news to tell.

    The thread that hands out shared memory reports every lost connection through ``sys.excepthook``; what goes wrong
    in the worker itself takes another way, to the loop over the loader.
    """
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)
