"""The loader that ``setup_dataloaders`` returns: the user's own, which knows the device, the epoch and the rank."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from fabric_core.data import place
from fabric_core.data.collections import mover
from fabric_core.data.iteration import Iteration, LoaderTracker
from fabric_core.data.order import Order
from fabric_core.data.own import Own
from fabric_core.data.reading import Reading
from fabric_core.data.samplers import listeners_of
from fabric_core.data.seed import mixed
from fabric_core.data.sharding import (
    dealt_alone,
    epoch_listeners,
    reseed,
    shard_loader,
    share_of,
    twin_of,
)
from fabric_core.data.share import Share
from fabric_core.data.streams import Streams
from fabric_core.errors import ConfigurationError, WrongTypeError
from fabric_core.wrappers.face import put_on, unwrap


class FabricDataLoader(Reading):
    """A loader that was set up. It is an instance of the class of the user's loader, and shares its attributes.

    Each loop over it tells samplers and dataset the epoch (``set_epoch``), counting loops from 0, and moves batches
    to the device. Workers do not outlive the process, and seed the generators of Python, NumPy and PyTorch before each
    sample: by (seed, loader, epoch, number of the sample), see [Note: numbered samples]. In a state for ``fabric.save``
    it stands for the place that its loop has come to, see [Note: places]. Pickled or copied, it is the plain loader.
    Where the user's class has an attribute of one of the following names itself, that is what is seen.

    Attributes:
        device: Where batches are moved to; ``None`` when they stay where they are.
        epoch: In a loop its epoch, else that of the next loop. May be set, for the next loop.
        position: In a loop the number of the batch, from 0; else -1.
        is_last_batch: Whether the batch is the last one of the loop. May load the next one, if there is no length.
    """

    __slots__ = ()

    device: torch.device | None
    epoch: int
    position: int
    is_last_batch: bool

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        own = self._fabric
        resumed, own.resumed = own.resumed, None
        epoch = self._take_epoch()
        self._announce(epoch)
        loop = self._loop_of(epoch, resumed)
        own.order = loop.order
        raw = self._raw_batches(loop.order)
        read = loop.order.counted(raw)
        there = read if own.transfer is None else own.transfer(read)
        if resumed is not None:
            there = place.go_on(there, loop, resumed["loop"])
            own.next_epoch = resumed["next_epoch"]
        batches = loop.run(there, own.tracker, lambda: self._begin(loop))
        own.batches = weakref.ref(batches)
        if raw is self._iterator:
            own.serves = own.batches
        return batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next loop; the ones after it count on from there."""
        own = self._fabric
        if own.resumed is not None and own.resumed["epoch"] != epoch:
            own.resumed = None
        own.next_epoch, own.chosen = epoch, True

    def state_dict(self) -> dict[str, Any]:
        """The place that this process has come to, see [Note: places]: tensors and plain values.

        The random numbers of the process are not part of it. ``fabric.save`` adds them, and the places of other ranks.

        Raises:
            ConfigurationError: In a loop, when batches come in whatever order workers finish (``in_order=False``).
        """
        own = self._fabric
        order, loop = self._place()
        if order is not None and order.is_lost:
            raise ConfigurationError(
                f"The class {type(self._fabric_original).__qualname__} lets its sampler begin several times in a loop, "
                "so the order of the samples cannot be found again. Save after the loop, or let a batch sampler repeat "
                "what is to be repeated."
            )
        if loop is not None and self.num_workers and not getattr(self, "in_order", True):
            raise ConfigurationError(
                "A loader with in_order=False does not know in its loop which batches are left. Save after the loop, "
                "or create the loader with in_order=True."
            )
        share, order_seed = self._dealing()
        return {
            "epoch": own.next_epoch if order is None else order.epoch,
            "next_epoch": own.next_epoch,
            "seed": own.seed,
            "number": own.number,
            "order seed": order_seed,
            "share": share._asdict(),
            "samples": place.samples_in(self),
            "samplers": place.sampler_states(self) if order is None else order.samplers,
            "generators": [generator.get_state() for generator in place.generators_of(self)],
            "workers": self._has_workers(),
            "loop": loop,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next loop go on from a place.

        Args:
            state: What `state_dict` gave, in this process or another one.

        Raises:
            CheckpointError: It is the state of something else, or of a loop over other data.
        """
        own = self._fabric
        place.check(self, state)
        if own.seeds_samples:
            own.seed, own.number = state["seed"], state["number"]
        self._deal_by(state["order seed"])
        for generator, saved in zip(place.generators_of(self), state["generators"], strict=False):
            generator.set_state(saved)
        for part, saved in zip(place.stateful_samplers(self), state["samplers"], strict=False):
            part.load_state_dict(saved)
        own.next_epoch, own.chosen = state["epoch"], True
        own.resumed = None if state["loop"] is None else state
        self._iterator = None
        own.had_workers = state["workers"] and own.resumed is None

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
        return copy.deepcopy(twin_of(self._fabric_original), memo)

    def _place(self) -> tuple[Order | None, dict[str, Any] | None]:
        """The order and the state of the innermost loop; of one that has begun, although nothing was asked of it."""
        own = self._fabric
        loop = own.tracker.of(self)
        if loop is not None:
            return loop.order, place.state_of(self, loop.order, loop.position + 1, loop.marks, loop.ended)
        batches, order = own.batches() if own.batches else None, own.order
        if order is None or batches is None or inspect.getgeneratorstate(batches) != inspect.GEN_CREATED:
            return None, None
        return order, order.resumed or place.state_of(self, order)

    # -- a loop begins ------------------------------------------------------------------------------------------------

    def _loop_of(self, epoch: int, resumed: dict[str, Any] | None) -> Iteration:
        """The loop of an epoch; one that was interrupted goes on."""
        own = self._fabric
        share, seed = self._dealing()
        generators = place.generators_of(self)
        order = Order(epoch, share, generators=generators, seed=seed, key=self._key(epoch, seed is not None))
        order.samplers = place.sampler_states(self)
        if own.had_workers and self.persistent_workers:
            order.start = Streams.capture(generators)
        own.had_workers = False
        given, total = (0, None) if resumed is None else place.put(order, self, own.source, resumed)
        mark = partial(place.mark_of, self)
        return Iteration(self, epoch, order, position=given - 1, total=total, mark=mark)

    def _has_workers(self) -> bool:
        """Whether there are persistent workers, or would be if the next loop had begun where it was interrupted."""
        return self._fabric.had_workers or (self.persistent_workers and self._iterator is not None)

    def _dealing(self) -> tuple[Share, int | None]:
        """How the order of the samples is dealt out, and the seed of one that is."""
        share, seed = share_of(self)
        dealer = self._fabric.dealer
        return share, dealer[1] if dealer else seed

    def _deal_by(self, seed: int | None) -> None:
        """Follow the order of a seed from now on; ``None`` lets the sampler decide, if it is not dealt out."""
        dealt = share_of(self)[1] is not None
        self._fabric.dealer = None
        if seed is not None and dealt:
            reseed(self, seed)
        elif seed is not None:
            self._fabric.dealer = dealt_alone(self, seed), seed

    def _key(self, epoch: int, dealt: bool) -> int | None:
        """What the seeds of an epoch's samples follow from: on all ranks the same, if each sample is on one only."""
        own = self._fabric
        if not own.seeds_samples or self.num_workers == 0:
            return None
        generator = self.generator.initial_seed() if isinstance(self.generator, torch.Generator) else 0
        seed = Streams.capture(torch_only=True).fingerprint() if own.seed is None else own.seed
        return mixed(seed, 0 if dealt else own.rank, own.number, epoch, generator) >> 1  # fits into int64

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
        dealer = self._fabric.dealer
        for listener in (*epoch_listeners(self), *listeners_of(dealer and dealer[0])):
            listener.set_epoch(epoch)
        self._fabric.announced = epoch
        self._fabric.heard = self._ask_epoch()

    def _begin(self, loop: Iteration) -> None:
        """Samplers may look at the epoch as late as at the first batch, when another loop has announced its own."""
        self._fabric.order = loop.order
        if self._fabric.announced != loop.epoch:
            self._announce(loop.epoch)
        if self.num_workers == 0 and place.is_read_again(self):
            loop.order.note_first()

    def _ask_epoch(self) -> int | None:
        epochs = (getattr(part, "epoch", None) for part in epoch_listeners(self))
        return next((epoch for epoch in epochs if isinstance(epoch, int)), None)


_PUBLIC: dict[str, Callable[[Own, Iteration | None], Any]] = {
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
    seed_workers: bool | None,
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
        seed_workers: Whether to seed worker processes, and each sample in them: ``True`` by the seed, ``None`` by a
            number that each loop draws, without taking it from anybody.
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
    wrapped._fabric = Own(
        source=loader,
        device=device,
        transfer=None if move is None else lambda batches: transfer(batches, move),
        tracker=tracker,
        rank=rank,
        number=number,
        seed=seed if seed_workers else None,
        seeds_samples=seed_workers is not False,
    )
    return wrapped
