"""The loader that ``setup_dataloaders`` returns: the user's own, which knows the device, the epoch and the rank."""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from fabric_core.data.collections import mover
from fabric_core.data.iteration import Iteration, LoaderTracker
from fabric_core.data.sharding import epoch_listeners, shard_loader, twin_of
from fabric_core.data.workers import WorkerInit
from fabric_core.errors import WrongTypeError
from fabric_core.wrappers.face import Face, put_on, unwrap

if TYPE_CHECKING:

    class _Base(Face, DataLoader[Any]):
        pass

else:
    _Base = Face


@dataclass
class _Own:
    """What a set-up loader has to itself.

    Attributes:
        source: The loader as the user gave it. Kept, because its class may clean up when it dies.
        device, transfer: Where batches go, and how; ``None`` when they stay.
        seeds: What the seeds of workers depend on besides the epoch; ``None`` when they are not seeded.
        next_epoch: The epoch of the next loop.
        chosen: Whether the user set ``next_epoch``.
        announced: The epoch that samplers and dataset were told last.
        heard: What the first of them said its epoch was afterwards.
        batches: The loop that uses the loader's persistent workers.
    """

    source: Any
    device: torch.device | None
    transfer: Callable[[Iterator[Any]], Iterator[Any]] | None
    tracker: LoaderTracker
    seeds: tuple[int, ...] | None
    next_epoch: int = 0
    chosen: bool = False
    announced: int | None = None
    heard: int | None = None
    batches: weakref.ref[Generator[Any, None, None]] | None = field(default=None, repr=False)


class FabricDataLoader(_Base):
    """A loader that was set up. It is an instance of the class of the user's loader, and shares its attributes.

    Each loop over it tells samplers and dataset the epoch (``set_epoch``), counting loops from 0, and moves batches
    to the device. Workers are seeded by (seed, rank, loader, epoch, worker) when the run is seeded, and do not
    outlive the process. Pickled or copied, it is the plain loader. Where the user's class has an attribute of one of
    the following names itself, that is what is seen.

    Attributes:
        device: Where batches are moved to; ``None`` when they stay where they are.
        epoch: In a loop its epoch, else that of the next loop. May be set, for the next loop.
        position: In a loop the number of the batch, from 0; else -1.
        is_last_batch: Whether the batch is the last one of the loop. May load the next one, if there is no length.
    """

    __slots__ = ("_fabric",)
    _fabric: _Own

    device: torch.device | None
    epoch: int
    position: int
    is_last_batch: bool

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        own = self._fabric
        epoch = self._take_epoch()
        self._announce(epoch)
        raw = self._raw_batches()
        there = raw if own.transfer is None else own.transfer(raw)
        batches = Iteration(self, epoch).run(there, own.tracker, self._announce_again)
        if raw is self._iterator:
            own.batches = weakref.ref(batches)
        return batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next loop; the ones after it count on from there."""
        self._fabric.next_epoch = epoch
        self._fabric.chosen = True

    def __getattr__(self, name: str) -> Any:
        if name in _PUBLIC:
            return _PUBLIC[name](self._fabric, self._fabric.tracker.of(self))
        theirs = getattr(super(), "__getattr__", None)
        if theirs is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return theirs(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "epoch" and not hasattr(self._fabric_original, name):
            self.set_epoch(value)
        else:
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return unwrap, (twin_of(self._fabric_original),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        import copy

        return copy.deepcopy(twin_of(self._fabric_original), memo)

    def _take_epoch(self) -> int:
        """The epoch of the loop that begins; one that was set at the sampler by hand counts, too."""
        own = self._fabric
        by_hand = self._ask_epoch()
        if by_hand is not None and by_hand != own.heard and not own.chosen:
            own.next_epoch = by_hand
        own.chosen = False
        own.next_epoch += 1
        return own.next_epoch - 1

    def _announce(self, epoch: int) -> None:
        if callable(theirs := getattr(self._fabric_original, "set_epoch", None)):
            theirs(epoch)
        for listener in epoch_listeners(self):
            listener.set_epoch(epoch)
        self._fabric.announced = epoch
        self._fabric.heard = self._ask_epoch()

    def _announce_again(self, epoch: int) -> None:
        """Samplers may look at the epoch as late as at the first batch, when another loop has announced its own."""
        if self._fabric.announced != epoch:
            self._announce(epoch)

    def _ask_epoch(self) -> int | None:
        epochs = (getattr(part, "epoch", None) for part in epoch_listeners(self))
        return next((epoch for epoch in epochs if isinstance(epoch, int)), None)

    def _raw_batches(self) -> Iterator[Any]:
        running = self._iterator
        batches = self._fabric.batches() if self._fabric.batches else None
        if running is None or batches is None or inspect.getgeneratorstate(batches) == inspect.GEN_CLOSED:
            return super().__iter__()
        # Persistent workers serve one loop at a time. This one is inside another, so it gets its own.
        self._iterator = None
        try:
            return super().__iter__()
        finally:
            self._iterator = running

    def _get_iterator(self) -> Any:
        """Called by ``DataLoader`` when it is about to start workers."""
        users = self.worker_init_fn
        self.worker_init_fn = WorkerInit(users, self._worker_seeds(), _parent_pid())
        try:
            return super()._get_iterator()
        finally:
            self.worker_init_fn = users

    def _worker_seeds(self) -> tuple[int, ...] | None:
        own = self._fabric
        if own.seeds is None:
            return None
        generator = self.generator.initial_seed() if isinstance(self.generator, torch.Generator) else 0
        return (*own.seeds, own.announced or 0, generator)


_PUBLIC: dict[str, Callable[[_Own, Iteration | None], Any]] = {
    "device": lambda own, _: own.device,
    "epoch": lambda own, loop: own.next_epoch if loop is None else loop.epoch,
    "position": lambda _, loop: -1 if loop is None else loop.position,
    "is_last_batch": lambda _, loop: loop is not None and loop.is_last_batch,
}


def wrap_loader(
    loader: Any,
    *,
    device: torch.device | None,
    num_replicas: int,
    rank: int,
    seed: int,
    tracker: LoaderTracker,
    shard: bool,
    seed_workers: bool,
    transfer: Callable[[Iterator[Any], Callable[[Any], Any]], Iterator[Any]] = lambda batches, move: map(
        move, batches
    ),
) -> FabricDataLoader:
    """Set a loader up. Called on every rank, in the same order and with the same seed.

    Args:
        loader: A ``DataLoader``. It is not changed; without ``shard`` (or with one replica) it shares its attributes
            with the result.
        device: Where batches are moved to; ``None`` leaves them where they are.
        num_replicas: Between how many ranks the data is split.
        rank: Whose share this is, from 0.
        seed: Of the order of samples, and of workers.
        tracker: Shared by the loaders of one ``Fabric``.
        shard: Whether to split the data, see `shard_loader`.
        seed_workers: Whether to seed worker processes.
        transfer: Takes the batches of a loop and a function that moves one, and gives back the batches on the device.

    Raises:
        WrongTypeError: It is no ``DataLoader``.
        ConfigurationError: Its data cannot be split.
    """
    if isinstance(loader, list | tuple) and any(isinstance(each, DataLoader) for each in loader):
        raise WrongTypeError(
            f"setup_dataloaders takes each loader as an argument of its own, but got a {type(loader).__qualname__} of "
            "them. Write: setup_dataloaders(*loaders)."
        )
    if not isinstance(loader, DataLoader):
        raise WrongTypeError(
            f"setup_dataloaders takes torch.utils.data.DataLoader objects, but got a {type(loader).__qualname__}. "
            "Wrap a dataset in DataLoader(dataset, ...). Any other source of batches needs no set-up: loop over it, "
            "move each batch with fabric.to_device(batch), and split it by fabric.global_rank and fabric.world_size."
        )
    plain = shard_loader(loader, num_replicas=num_replicas, rank=rank, seed=seed) if shard else loader
    number = tracker.next_number()
    move = None if device is None else mover(device)
    wrapped = put_on(FabricDataLoader, plain)
    wrapped._fabric = _Own(
        source=loader,
        device=device,
        transfer=None if move is None else lambda batches: transfer(batches, move),
        tracker=tracker,
        seeds=(seed, rank, number) if seed_workers else None,
    )
    return wrapped


def _parent_pid() -> int | None:
    """This process, if its main thread starts the workers: on Linux they would die with any other thread."""
    return os.getpid() if threading.current_thread() is threading.main_thread() else None
