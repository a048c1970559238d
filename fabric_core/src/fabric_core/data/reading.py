"""How a loop reads: by PyTorch's own iterator, which finds our order where it looks for the sampler's."""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, IterableDataset

from fabric_core.data.order import Indices, Order
from fabric_core.data.own import Own
from fabric_core.data.workers import SeededDataset, WorkerInit, keeping_garbage
from fabric_core.wrappers.face import Face

if TYPE_CHECKING:

    class _Base(Face, DataLoader[Any]):
        pass

else:
    _Base = Face


class Reading(_Base):
    """The part of a loader that was set up in which iterators are made: what ``DataLoader`` calls, and asks for.

    Its attributes are those of the user's loader.
    """

    __slots__ = ("_fabric",)
    _fabric: Own

    def _raw_batches(self, order: Order) -> Iterator[Any]:
        running = self._iterator
        order.reader = weakref.ref(running) if running is not None else None
        batches = self._fabric.serves() if self._fabric.serves else None
        if running is None or batches is None or inspect.getgeneratorstate(batches) == inspect.GEN_CLOSED:
            return super().__iter__()
        # Persistent workers serve one loop at a time. This one is inside another, so it gets its own.
        self._iterator = None
        try:
            return super().__iter__()
        finally:
            self._iterator = running

    def _get_iterator(self) -> Any:
        """Called by ``DataLoader`` at the start of a loop, unless it has workers already."""
        own, order = self._fabric, self._fabric.order
        if order is None:  # somebody else called
            return super()._get_iterator()
        garbage = keeping_garbage() if self.num_workers else nullcontext()
        with self._lent_to_workers(order) as numbered, order.creation(), garbage:
            if not isinstance(self.dataset, IterableDataset):
                sampler, itself = own.dealer[0] if own.dealer else self._index_sampler, weakref.ref(own)
                own.indices = Indices(sampler, lambda: _order_of(itself), numbered=numbered)
            try:
                iterator = super()._get_iterator()
            finally:
                own.indices = None
            order.reader = weakref.ref(iterator)
            return iterator

    @contextmanager
    def _lent_to_workers(self, order: Order) -> Iterator[bool]:
        """While workers are started they find our function and data set around the user's; ``True`` if they do."""
        init, dataset, attributes = self.worker_init_fn, self.dataset, vars(self)
        seeds = None if order.key is None else (order.key, self._fabric.rank)
        wraps = seeds is not None and attributes.get("dataset") is dataset
        wraps = wraps and not isinstance(dataset, IterableDataset)
        try:
            self.worker_init_fn = WorkerInit(init, seeds, _parent_pid())
            if wraps:
                attributes["dataset"] = SeededDataset(dataset)  # past DataLoader.__setattr__, which refuses
            yield wraps
        finally:
            self.worker_init_fn = init
            if wraps:
                attributes["dataset"] = dataset

    @property
    def _index_sampler(self) -> Any:
        """What ``DataLoader`` takes indices from."""
        indices = self._fabric.indices
        return super()._index_sampler if indices is None else indices


def _order_of(own: weakref.ref[Own]) -> Order:
    alive = own()
    assert alive is not None and alive.order is not None  # noqa: PT018 - a loop has begun
    return alive.order


def _parent_pid() -> int | None:
    """This process, if its main thread starts the workers: on Linux they would die with any other thread."""
    return os.getpid() if threading.current_thread() is threading.main_thread() else None
