"""What a rank has to itself and a run goes on from: the places of its loaders, and its random numbers.

[Note: of all ranks] Rank 0 writes most checkpoints, so it is told what the others have: a few kilobytes per rank. On
as many ranks as before, each gets back its own. On another number of ranks, each goes on with its share of the order of
samples that was left, and with the random numbers of the rank of its number, or with new ones that follow from those of
rank 0 where there was no such rank.
"""

from __future__ import annotations

import io
import logging
import pickle
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fabric_core.contracts.strategy import Strategy
from fabric_core.data.loader import FabricDataLoader
from fabric_core.data.place import has_state, users_samplers
from fabric_core.data.seed import mixed, seed_worker
from fabric_core.data.streams import Streams
from fabric_core.errors import CheckpointError, listing
from fabric_core.wrappers.face import unwrap

_log = logging.getLogger("fabric_core")


def loaders_in(state: Any) -> list[FabricDataLoader]:
    """The loaders in a state that were set up, each once."""
    return list({id(loader): loader for loader in _walk(state)}.values())


def states_of_ranks(loaders: Sequence[FabricDataLoader], strategy: Strategy) -> list[dict[str, Any]]:
    """What every rank goes on from. Called on every rank, with the same loaders in the same order.

    Returns:
        By rank: its ``random`` numbers, and the places of its ``loaders``.

    Raises:
        CheckpointError: A place holds more than tensors and plain values.
    """
    _warn_of_others(loaders)
    _warn_of_hidden_numbers(loaders)
    own = {"random": _random_numbers(strategy), "loaders": [loader.state_dict() for loader in loaders]}
    return [own] if strategy.world_size == 1 else _gathered(own, strategy)


def restore_place(loader: FabricDataLoader, places: Any, strategy: Strategy) -> None:
    """Let a loader go on where it stood. Called on every rank.

    Args:
        loader: The loader.
        places: Of all ranks of the run that was interrupted.
        strategy: Knows this rank.

    Raises:
        CheckpointError: These are no places, or the loader cannot go on from them on this number of ranks.
    """
    name = type(unwrap(loader)).__name__
    if not (isinstance(places, list) and places and all(isinstance(place, dict) for place in places)):
        raise CheckpointError(
            f"The checkpoint was not saved with a loader that setup_dataloaders() had returned, where the state has a "
            f"{name}. Leave the loader out of the state, or save it with fabric.save()."
        )
    loop = places[0].get("loop")
    if loop and loop["stream"] is not None and len(places) != strategy.world_size:
        raise CheckpointError(
            f"The checkpoint was saved in the middle of an epoch of an IterableDataset on {len(places)} ranks, and "
            f"there are {strategy.world_size} now: nobody but that data set knows what each rank has to read. Resume "
            f"on {len(places)} ranks, or from a checkpoint that was saved between two epochs."
        )
    loader.load_state_dict(_place_for(loader, places, strategy.global_rank))


def restore_random(states: list[dict[str, Any]], strategy: Strategy) -> None:
    """Give this process its random numbers back, see [Note: of all ranks]. Called on every rank, last of all."""
    rank, device = strategy.global_rank, strategy.root_device
    if rank == 0 and len(states) < strategy.world_size:
        _log.warning(
            "The checkpoint was saved by %d ranks and is loaded by %d: the random numbers of the new ones follow from "
            "those of rank 0.",
            len(states),
            strategy.world_size,
        )
    if rank >= len(states):
        seed_worker(mixed(Streams.from_state_dict(states[0]["host"]).fingerprint(), rank) >> 1)
        return
    Streams.from_state_dict(states[rank]["host"]).restore()
    if states[rank]["device"] is not None:
        strategy.surroundings.accelerator.set_rng_state(states[rank]["device"], device)


def _walk(state: Any) -> Iterator[FabricDataLoader]:
    if isinstance(state, FabricDataLoader):
        yield state
    elif isinstance(state, Mapping | list | tuple):
        for entry in state.values() if isinstance(state, Mapping) else state:
            yield from _walk(entry)


def _random_numbers(strategy: Strategy) -> dict[str, Any]:
    device = strategy.surroundings.accelerator.rng_state(strategy.root_device)
    return {"host": Streams.capture().state_dict(), "device": device}


def _gathered(own: dict[str, Any], strategy: Strategy) -> list[dict[str, Any]]:
    """What each rank has, as bytes of equal length through the strategy's own collective."""
    device, file = strategy.root_device, io.BytesIO()
    torch.save(own, file)
    data = torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)
    sizes = strategy.all_gather(torch.tensor([len(data)], device=device)).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
    padded[: len(data)] = data
    rows = strategy.all_gather(padded.to(device)).cpu()
    try:
        return [
            torch.load(io.BytesIO(row[:size].numpy().tobytes()), weights_only=True)
            for row, size in zip(rows, sizes, strict=True)
        ]
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "The place of a loader holds more than tensors and plain values, which no checkpoint may: it is in what "
            f"state_dict() of a sampler, a data set or the loader's own class returns. {error}"
        ) from error


def _place_for(loader: FabricDataLoader, places: list[dict[str, Any]], rank: int) -> dict[str, Any]:
    """The place of this rank; of one that had the same share of the data; of rank 0."""
    share = loader.state_dict()["share"]
    own = places[rank : rank + 1]
    alike = [
        place
        for place in (*own, *places)
        if all(place["share"][name] == share[name] for name in ("replicas", "rank"))
    ]
    return (alike or places)[0]


def _warn_of_hidden_numbers(loaders: Sequence[FabricDataLoader]) -> None:
    """Name what draws from generators that are in no state; what is told the epoch may well make them anew for each."""
    numpy: Any = sys.modules.get("numpy.random")
    kinds = (random.Random, *((numpy.Generator, numpy.RandomState) if numpy else ()))
    parts = [part for each in loaders for part in (*users_samplers(each), each.dataset)]
    for part in parts:
        hidden = [name for name, value in getattr(part, "__dict__", {}).items() if isinstance(value, kinds)]
        if hidden and not has_state(part) and not hasattr(type(part), "set_epoch"):
            warnings.warn(
                f"A checkpoint is saved with a loader whose {type(part).__name__} draws from random numbers of its own "
                f"({listing(hidden)}), which nobody saves: a resumed run draws others. Give it the methods state_dict "
                "and load_state_dict (and put a data set into the state), or let it draw from a torch.Generator that "
                "it calls 'generator' (a sampler), or from the generators of the process.",
                UserWarning,
                stacklevel=6,
            )


def _warn_of_others(loaders: Sequence[FabricDataLoader]) -> None:
    for tracker in {id(loader._fabric.tracker): loader._fabric.tracker for loader in loaders}.values():
        others = [
            loop.loader for loop in tracker.live if all(loop.loader is not loader for loader in loaders)
        ]
        if others:
            warnings.warn(
                f"A checkpoint is saved inside of a loop over a {type(unwrap(others[0])).__name__} that is not in its "
                "state, beside one that is: resumed, that loop would begin anew. Put all loaders into the state whose "
                "loops are running.",
                UserWarning,
                stacklevel=6,
            )
