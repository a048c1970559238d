"""Split the data of a loader between ranks.

[Note: twins] A loader is never created again from its arguments, which its class may have hidden or computed. It is
copied as it is, and ``sampler`` or ``batch_sampler`` of the copy is replaced. So subclasses with any constructor
work, and keep their attributes.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.dataloader import _BaseDataLoaderIter
from torch.utils.data.distributed import DistributedSampler

from fabric_core.data.samplers import (
    DistributedBatchSampler,
    DistributedSamplerWrapper,
    chain_of,
    listeners_of,
    torchs,
)
from fabric_core.data.share import Share
from fabric_core.errors import CheckpointError, ConfigurationError

L = TypeVar("L", bound="DataLoader[Any]")


def shard_loader(loader: L, *, num_replicas: int, rank: int, seed: int = 0, shuffle: bool | None = None) -> L:
    """A loader for the share of one rank. Called on every rank with the same seed.

    Args:
        loader: Any ``DataLoader``; it is not changed.
        num_replicas: Between how many ranks the data is split; with one, ``loader`` itself is returned.
        rank: Whose share the result loads, from 0.
        seed: Decides the order, together with the epoch.
        shuffle: Whether to shuffle, where the sampler is a plain random or sequential one; by default as it does
            itself. Other samplers decide their order in any case.

    Returns:
        A copy of ``loader`` with another sampler. ``loader`` itself when it is distributed already, and when it has
        an ``IterableDataset``, with a ``UserWarning`` that every rank will see all the data.

    Raises:
        ConfigurationError: ``rank`` is out of range, or the copy would go on with the undivided data.
    """
    if not 0 <= rank < num_replicas:
        raise ConfigurationError(
            f"Data cannot be split for rank {rank} of {num_replicas}: ranks count from 0."
        )
    if num_replicas == 1:
        return loader
    iterable = isinstance(loader.dataset, IterableDataset)
    in_batches = loader.batch_sampler is not None
    source: Any = loader.batch_sampler if in_batches else loader.sampler
    if (part := _distributed_part(loader.dataset if iterable else source)) is not None:
        _check_share(part, num_replicas, rank)
        return loader
    if iterable:
        _warn_of_duplicates(loader.dataset)
        return loader
    share = _share_of(source, num_replicas, rank, seed, shuffle, in_batches)
    if not in_batches:
        return _twin_with(loader, sampler=share)
    if type(source) in torchs(BatchSampler):
        return _twin_with(loader, batch_sampler=share, sampler=share.sampler)
    return _twin_with(loader, batch_sampler=share)


def twin_of(loader: L) -> L:
    """A copy that shares the dataset, the samplers and everything else, but no running iterator."""
    twin = object.__new__(type(loader))
    twin.__dict__.update(loader.__dict__, _iterator=None)
    return twin


def epoch_listeners(loader: DataLoader[Any]) -> list[Any]:
    """What in a loader wants to know the epoch: samplers first, then the dataset. Each has a ``set_epoch``."""
    found = listeners_of(loader.batch_sampler)
    found += [part for part in listeners_of(loader.sampler) if all(part is not other for other in found)]
    if callable(getattr(loader.dataset, "set_epoch", None)):
        found.append(loader.dataset)
    return found


def share_of(loader: DataLoader[Any]) -> tuple[Share, int | None]:
    """How the order of a loader that may be divided is dealt out, and the seed of that order if it is dealt by one."""
    if isinstance(loader.dataset, IterableDataset):
        return Share(1, 0, None), None
    source: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    size: int | None = 1
    if loader.batch_sampler is not None:
        size = source.batch_size if type(source) in torchs(BatchSampler) else None
    part = _distributed_part(source)
    if part is None:
        return Share(1, 0, size), None
    return Share(_replicas_of(part), part.rank, size), getattr(part, "seed", 0)


def whole_order(loader: DataLoader[Any], seed: int, epoch: int) -> Any:
    """The elements that are dealt out under a seed in an epoch: indices, or whole batches of a batch sampler.

    Args:
        loader: The undivided one.
        seed, epoch: What the order follows from.

    Raises:
        CheckpointError: Its own sampler decides what each rank gets.
    """
    in_batches = loader.batch_sampler is not None
    source: Any = loader.batch_sampler if in_batches else loader.sampler
    if type(source) in torchs(BatchSampler):
        source, in_batches = source.sampler, False
    if type(source) in torchs(DistributedSampler):
        order: Any = DistributedSampler(source.dataset, 1, 0, shuffle=source.shuffle, seed=seed)
    elif (part := _distributed_part(source)) is not None:
        raise CheckpointError(
            f"A loop that was interrupted on another number of ranks cannot go on: the {type(part).__qualname__} of "
            "this loader decides by itself what each rank gets. Resume on as many ranks as before, or give the loader "
            "a sampler that knows no ranks; it is dealt out for you."
        )
    else:
        order = _share_of(source, 1, 0, seed, None, in_batches)
    order.set_epoch(epoch)
    return order


def dealt_alone(loader: DataLoader[Any], seed: int) -> Any:
    """What takes the place of the sampler that decides the batches, when one rank goes on with a seed's order."""
    in_batches = loader.batch_sampler is not None
    return _share_of(loader.batch_sampler if in_batches else loader.sampler, 1, 0, seed, None, in_batches)


def reseed(loader: DataLoader[Any], seed: int) -> None:
    """Let the order that is dealt out follow from another seed."""
    source = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if hasattr(part := _distributed_part(source), "seed"):
        part.seed = seed


def _share_of(
    source: Any, num_replicas: int, rank: int, seed: int, shuffle: bool | None, in_batches: bool
) -> Any:
    shuffles = type(source) in torchs(RandomSampler) and _visits_each_once(source)
    if shuffles or type(source) is SequentialSampler:
        return DistributedSampler(
            source.data_source,
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffles if shuffle is None else shuffle,
            seed=seed,
        )
    if type(source) in torchs(BatchSampler):
        indices = _share_of(source.sampler, num_replicas, rank, seed, shuffle, False)
        return BatchSampler(indices, source.batch_size, source.drop_last)
    wrapper = DistributedBatchSampler if in_batches else DistributedSamplerWrapper
    return wrapper(source, num_replicas=num_replicas, rank=rank, seed=seed)


def _visits_each_once(sampler: RandomSampler) -> bool:
    return not sampler.replacement and sampler.num_samples == len(sampler.data_source)


def _twin_with(loader: L, **new: Any) -> L:
    name = type(loader).__qualname__
    for attribute, value in vars(loader).items():
        if isinstance(value, _BaseDataLoaderIter) and attribute != "_iterator":
            raise ConfigurationError(
                f"The data of a {name} cannot be split between ranks: it keeps a running iterator in its attribute "
                f"{attribute!r}, which goes on with the undivided data. Create the iterator in __iter__, or split "
                "the data yourself and pass use_distributed_sampler=False."
            )
    twin = twin_of(loader)
    twin.__dict__.update(new)  # past DataLoader.__setattr__, which refuses
    for attribute, value in new.items():
        if getattr(twin, attribute) is not value:
            raise ConfigurationError(
                f"The data of a {name} cannot be split between ranks: its class computes {attribute!r} itself. "
                "Split the data there, and pass use_distributed_sampler=False."
            )
    return twin


def _distributed_part(source: Any) -> Any:
    for part in chain_of(source):
        if hasattr(part, "rank") and (hasattr(part, "num_replicas") or hasattr(part, "world_size")):
            return part
    return None


def _replicas_of(part: Any) -> int:
    replicas: int = part.num_replicas if hasattr(part, "num_replicas") else part.world_size
    return replicas


def _check_share(part: Any, num_replicas: int, rank: int) -> None:
    replicas = _replicas_of(part)
    if (replicas, part.rank) != (num_replicas, rank):
        warnings.warn(
            f"The loader's {type(part).__qualname__} yields the share of rank {part.rank} of {replicas}, but this "
            f"is rank {rank} of {num_replicas}; it is left as it is. Create it after the processes were launched, "
            "or give the loader a plain sampler (or shuffle=True), which will be split for you.",
            UserWarning,
            stacklevel=5,
        )


def _warn_of_duplicates(dataset: Any) -> None:
    warnings.warn(
        f"Every rank will see all the data of the {type(dataset).__qualname__}: an IterableDataset decides its order "
        "itself, so it cannot be split from outside. Skip what belongs to other ranks in its __iter__, by "
        "fabric.global_rank and fabric.world_size. Then, or if every rank is meant to see everything, pass "
        "use_distributed_sampler=False.",
        UserWarning,
        stacklevel=5,
    )
