"""Samplers that yield the share of one rank.

[Note: dealing] Of what a sampler yields, rank r of n gets the elements r, r + n, r + 2n, … For that all ranks have
to see the same order. So the sampler runs on random streams of its own, which start from the seed and the epoch and
are the same on every rank, whatever else has drawn random numbers there. A last round that is not full is filled up
with the first elements: all ranks get equally many. ``torch.utils.data.DistributedSampler`` deals the same way.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils.data import DistributedSampler, Sampler

from fabric_core.data.seed import seeded_rng
from fabric_core.data.streams import Generators, Streams, preserved

_OURS = frozenset({"inner", "num_replicas", "rank", "seed", "epoch"})
_LARGEST_CHUNK = 4096


class DistributedSamplerWrapper(Sampler[Any]):
    """The share of one rank in what any sampler yields, see [Note: dealing].

    The order differs between epochs. A ``generator`` that the sampler (or the one that it draws from) holds is
    replaced while it runs, because its state may differ between ranks. A sampler that never ends is dealt as it
    goes. All other attributes are those of the wrapped sampler.

    Args:
        inner: Any iterable that can be iterated once per epoch.
        num_replicas: Between how many ranks it is dealt.
        rank: Whose share this is, from 0.
        seed: The same on every rank.

    Attributes:
        epoch: Set by `set_epoch`; an iteration that has begun keeps its own.
    """

    inner: Iterable[Any]
    num_replicas: int
    rank: int
    seed: int
    epoch: int

    def __init__(self, inner: Iterable[Any], *, num_replicas: int, rank: int, seed: int = 0) -> None:
        self.inner = inner
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        return dealt(_drawn(self.inner, self.seed + self.epoch), self.num_replicas, self.rank)

    def __len__(self) -> int:
        """The number of elements per rank. Raises ``TypeError`` when the sampler does not know its length."""
        total: int = len(self.inner)  # type: ignore[arg-type]
        return (total + self.num_replicas - 1) // self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the iterations that begin from now on, here and in the wrapped sampler."""
        self.epoch = epoch
        for listener in listeners_of(self.inner):
            listener.set_epoch(epoch)

    def __getattr__(self, name: str) -> Any:
        if name in _OURS or name.startswith("__"):  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OURS and hasattr(self.inner, name):
            setattr(self.inner, name, value)
        else:
            object.__setattr__(self, name, value)


class DistributedBatchSampler(DistributedSamplerWrapper):
    """The share of one rank in the batches of any batch sampler; what is in a batch stays together.

    Everything is as in `DistributedSamplerWrapper`, with batches (lists of indices) for elements.
    """


def dealt(elements: Iterator[Any], num_replicas: int, rank: int) -> Iterator[Any]:
    """The share of one rank in some elements, see [Note: dealing]."""
    first: list[Any] = []
    total = 0
    for element in elements:
        if total < num_replicas:
            first.append(element)
        if total % num_replicas == rank:
            yield element
        total += 1
    if 0 < total % num_replicas <= rank:
        yield first[(rank - total % num_replicas) % total]


def chain_of(source: Any) -> Iterator[Any]:
    """A sampler, the sampler that it draws from, and so on."""
    seen: dict[int, Any] = {}
    while source is not None and id(source) not in seen:
        yield source
        seen[id(source)] = source
        inner = getattr(source, "batch_sampler", None)
        source = getattr(source, "sampler", None) if inner is None else inner


def torchs(kind: type) -> set[type]:
    """A class of PyTorch's samplers, and what torchdata has in its place for its own loader: with the same order."""
    module = sys.modules.get("torchdata.stateful_dataloader.sampler")
    name = "StatefulDistributedSampler" if kind is DistributedSampler else kind.__name__
    return {kind, getattr(module, name, kind)}


def listeners_of(source: Any) -> list[Any]:
    """The first sampler of a chain that has a ``set_epoch``: telling those behind it is its own business."""
    return [part for part in chain_of(source) if callable(getattr(part, "set_epoch", None))][:1]


def replayed(sampler: Iterable[Any], moments: Mapping[str, Streams], generators: Generators) -> Iterator[Any]:
    """The elements of a sampler as it drew them once, on streams of its own.

    Args:
        sampler: The sampler.
        moments: The states of all streams when it was asked to begin (``begun``), and before its first element
            (``first``); each only if the order follows from it.
        generators: The user's, whose states are among those.
    """
    states = [moments["begun"]] if "begun" in moments else []

    @contextmanager
    def streams() -> Iterator[None]:
        with preserved(generators):
            for state in states:
                state.restore(generators)
            yield
            states[:] = [Streams.capture(generators)]

    with streams():
        elements = iter(sampler)
    if "first" in moments:
        states[:] = [moments["first"]]
    return _in_chunks(elements, streams)


def _drawn(inner: Iterable[Any], seed: int) -> Iterator[Any]:
    """The elements of a sampler, drawn on streams of its own."""
    own = seeded_rng(seed)
    generator = torch.Generator().manual_seed(seed)

    @contextmanager
    def streams() -> Iterator[None]:
        with own, _lent(generator, inner):
            yield

    with streams():
        elements = iter(inner)
    yield from _in_chunks(elements, streams)


def _in_chunks(elements: Iterator[Any], streams: Callable[[], AbstractContextManager[None]]) -> Iterator[Any]:
    """Take elements on other streams, several at a time, because to change streams takes time."""
    size = 16
    while True:
        with streams():
            chunk = list(itertools.islice(elements, size))
        yield from chunk
        if len(chunk) < size:
            return
        size = min(2 * size, _LARGEST_CHUNK)


@contextmanager
def _lent(generator: torch.Generator, inner: Any) -> Iterator[None]:
    owners = [
        part for part in chain_of(inner) if isinstance(getattr(part, "generator", None), torch.Generator)
    ]
    own = [part.generator for part in owners]
    for part in owners:
        part.generator = generator
    try:
        yield
    finally:
        for part, theirs in zip(owners, own, strict=True):
            part.generator = theirs
