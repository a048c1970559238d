"""Where a loader stands, as values that a checkpoint can hold, and how it gets there again.

[Note: places] In a loop, a loader's place is the epoch, how many batches the body of the loop was given, and what the
order of the samples follows from. Outside of loops it is the beginning of the next epoch. A loop whose last batch was
given is a loop still: taken up, it has no batch left, so that what the program does after it is done.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from fabric_core.data.iteration import Iteration
from fabric_core.data.order import Order, moments_of
from fabric_core.data.samplers import DistributedSamplerWrapper, chain_of, replayed, torchs
from fabric_core.data.sharding import whole_order
from fabric_core.data.share import Share
from fabric_core.data.streams import Generators, Streams, preserved
from fabric_core.errors import CheckpointError
from fabric_core.wrappers.face import unwrap


class Mark(NamedTuple):
    """What it takes to fetch a batch again that was fetched early.

    Attributes:
        streams: The random numbers before; ``None`` when a worker fetched it.
        stream: Where an ``IterableDataset`` stood; ``None`` for other datasets.
    """

    streams: Streams | None
    stream: dict[str, Any] | None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"streams": self.streams and self.streams.state_dict(), "stream": self.stream}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Mark:
        """What `state_dict` gave."""
        return cls(state["streams"] and Streams.from_state_dict(state["streams"]), state["stream"])


def mark_of(loader: DataLoader[Any]) -> Mark:
    """What it will take to fetch the next batch of a loader again."""
    streams = None if loader.num_workers else Streams.capture(generators_of(loader))
    return Mark(streams, stream_of(loader))


def generators_of(loader: DataLoader[Any]) -> Generators:
    """The generators that the user gave to a loader and its samplers."""
    owners = [loader, *chain_of(loader.batch_sampler), *chain_of(loader.sampler)]
    found = (getattr(owner, "generator", None) for owner in owners)
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def users_samplers(loader: DataLoader[Any]) -> list[Any]:
    """The samplers of a loader, each once; in place of one that deals out, the one that is dealt out."""
    parts = [*chain_of(loader.batch_sampler), *chain_of(loader.sampler)]
    own = (part.inner if isinstance(part, DistributedSamplerWrapper) else part for part in parts)
    return list({id(part): part for part in own}.values())


def stateful_samplers(loader: DataLoader[Any]) -> list[Any]:
    """The samplers of a loader that have a state of their own, each once. How far one has come is none."""
    counting = torchs(DistributedSampler)
    return [part for part in users_samplers(loader) if has_state(part) and type(part) not in counting]


def sampler_states(loader: DataLoader[Any]) -> list[Any]:
    """The states of the samplers that have one."""
    return [copy.deepcopy(part.state_dict()) for part in stateful_samplers(loader)]


def has_state(thing: Any) -> bool:
    """Whether a thing can say its state and take it back."""
    return all(callable(getattr(type(thing), name, None)) for name in ("state_dict", "load_state_dict"))


def stream_of(loader: DataLoader[Any]) -> dict[str, Any] | None:
    """Where an ``IterableDataset`` stands, if somebody knows; ``None`` for other datasets."""
    users = unwrap(loader)
    if not isinstance(loader.dataset, IterableDataset):
        return None
    if has_state(users):
        return {"loader": copy.deepcopy(users.state_dict())}
    if loader.num_workers == 0 and has_state(loader.dataset):
        dataset: Any = loader.dataset
        return {"dataset": copy.deepcopy(dataset.state_dict())}
    return {}


def restore_stream(loader: DataLoader[Any], loop: dict[str, Any]) -> bool:
    """Put an ``IterableDataset`` where it stood; ``False`` when only reading everything again leads there."""
    users, stream = unwrap(loader), loop["stream"]
    if "loader" in stream and has_state(users):
        users.load_state_dict(stream["loader"])
    elif "dataset" in stream and loader.num_workers == 0 and has_state(loader.dataset):
        dataset: Any = loader.dataset
        dataset.load_state_dict(stream["dataset"])
    else:
        return bool(loop["batches"] == 0)
    return True


def is_read_again(loader: DataLoader[Any]) -> bool:
    """Whether nobody knows where an ``IterableDataset`` stands."""
    known = has_state(unwrap(loader)) or has_state(loader.dataset)
    return isinstance(loader.dataset, IterableDataset) and not known


def check(loader: DataLoader[Any], state: Any) -> None:
    """Refuse the state of something else, and to go on in the middle of a data set that is another one now.

    Raises:
        CheckpointError: It is one of those.
    """
    name = type(unwrap(loader)).__name__
    if not isinstance(state, dict) or not {"epoch", "share", "loop"} <= set(state):
        raise CheckpointError(
            f"The state of a {name} that was set up is needed, as its state_dict() gives it; this is something else."
        )
    now = samples_in(loader)
    if state["loop"] is not None and now != state["samples"]:
        raise CheckpointError(
            f"The checkpoint was saved in the middle of an epoch of {state['samples']} samples, but the data set of "
            f"this {name} has {now}: the order of its samples would be another one. Resume with the same data, or "
            "leave the loader out of the state."
        )


def samples_in(loader: DataLoader[Any]) -> int | None:
    """How many samples a loader's data set has, if it knows."""
    dataset: Any = loader.dataset
    try:
        return None if isinstance(dataset, IterableDataset) else len(dataset)
    except TypeError:
        return None


def put(
    order: Order, loader: DataLoader[Any], users: DataLoader[Any], state: dict[str, Any]
) -> tuple[int, int | None]:
    """Let an order go on where another process left its own. Called before an iterator over the loader is made.

    Args:
        order: Of the loop that begins.
        loader: The loader that was set up.
        users: The one that the user gave, which is not divided.
        state: The whole state of the loader, saved in a loop.

    Returns:
        How many batches count as given to the body of the loop, and how many the whole loop has; ``None`` where it is
        as many as ever.

    Raises:
        CheckpointError: The order cannot be found again with what the loader is now.
    """
    loop, share = state["loop"], order.share
    if Share(**state["share"]) == share and not loop["handed on"]:
        order.take_up(loop)
        order.passed_over = loop["stream"] is not None and restore_stream(loader, loop)
        return loop["batches"], None
    if loop["rearranged"]:
        raise CheckpointError(
            f"The checkpoint was saved in the middle of an epoch of a {type(users).__name__}, whose class gives other "
            "batches than its sampler says, so nobody knows which samples are left for other ranks or other batches. "
            f"Resume on {state['share']['replicas']} rank(s) with the same batches, or from a checkpoint between two "
            "epochs."
        )
    if (state["share"]["size"] is None) != (share.size is None):
        raise CheckpointError(
            "The checkpoint was saved in the middle of an epoch, with a batch sampler that decided what is in a batch; "
            "this loader counts samples into batches, or the other way round. Resume with a batch sampler like that of "
            "before."
        )
    source: Any = users.sampler if users.batch_sampler is None else users.batch_sampler
    batched = share.size is not None and users.batch_sampler is not None
    drop_last = source.drop_last if batched else None
    whole, elements = _order_again(users, state, source, batched)
    order.take_over(loop, elements, drop_last)
    return order.before, _length(order, whole, bool(drop_last))


def _order_again(
    users: DataLoader[Any], state: dict[str, Any], source: Any, batched: bool
) -> tuple[Any, Callable[[], Iterator[Any]]]:
    """What has the length of the whole order of a loop that was interrupted, and a function that makes that order."""
    origin = state["loop"]["origin"]
    if "seed" in origin:
        order = whole_order(users, origin["seed"], state["epoch"])
        return order, lambda: iter(order)
    moments, generators = moments_of(state["loop"]), generators_of(users)
    if not batched:
        return source, lambda: replayed(source, moments, generators)
    one_by_one = type(source)(source.sampler, 1, False)  # of its class, to draw when that draws
    return source.sampler, lambda: (index for [index] in replayed(one_by_one, moments, generators))


def _length(order: Order, source: Any, drop_last: bool) -> int | None:
    share = order.share
    try:
        left = max(0, len(source) - order.begin)
    except TypeError:
        return None
    mine, size = -(-left // share.replicas), share.size or 1
    return order.before + (mine // size if drop_last else -(-mine // size))


def state_of(
    loader: DataLoader[Any],
    order: Order,
    batches: int = 0,
    marks: Sequence[Mark] = (),
    ended: bool = False,
) -> dict[str, Any]:
    """Where a loop stands: what `put` and `go_on` take.

    Args:
        loader: Over what.
        order: Of its samples.
        batches: How many its body was given.
        marks: For each batch that was fetched since.
        ended: Whether it is known that no others follow.
    """
    return {
        **order.state_dict(batches),
        "ended": ended,
        "marks": [mark.state_dict() for mark in marks],
        "stream": marks[0].stream if marks else stream_of(loader),
    }


def go_on(raw: Iterator[Any], loop: Iteration, state: dict[str, Any]) -> Iterator[Any]:
    """The batches of a loop from where another process left it.

    Args:
        raw: As the loader yields them, after `put`.
        loop: The loop that begins.
        state: What `state_of` gave.
    """
    order, generators = loop.order, generators_of(loop.loader)
    marks = [] if order.rest is not None else [Mark.from_state_dict(mark) for mark in state["marks"]]
    if (state["stream"] is not None or order.reads_again) and not order.passed_over:
        _read_again(raw, loop, state["batches"])
    batches = []
    for mark in marks:
        with preserved(generators):
            if mark.streams is not None:
                mark.streams.restore(generators)
            batches.append(next(raw))
    loop.ended = state["ended"]
    if not (batches or loop.ended):
        batches = list(itertools.islice(raw, 1))
    if not order.passed_over and batches and state["batches"]:
        _read_again(raw, loop, state["batches"] - 1)
        batches = list(itertools.islice(raw, 1))
    loop.keep(batches[1:], marks[1:])
    yield from batches[:1]
    if not loop.ended:
        yield from raw


def _read_again(raw: Iterator[Any], loop: Iteration, batches: int) -> None:
    name = type(unwrap(loop.loader)).__name__
    warnings.warn(
        f"The loop over a {name} goes on after {loop.position + 1} batches, which are read again and dropped: its "
        "class does not give what its sampler says, or it has an IterableDataset, where nothing can be passed over "
        "from outside. Give the data set (without workers) or the loader the methods state_dict and load_state_dict; "
        "torchdata's StatefulDataLoader has them.",
        UserWarning,
        stacklevel=4,
    )
    with loop.order.from_the_first():
        for _ in itertools.islice(raw, batches):
            pass
    loop.order.passed_over = True
