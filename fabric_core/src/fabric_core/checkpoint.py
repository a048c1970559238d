"""What ``save`` and ``load`` do with a state: a dictionary of models, optimizers, stateful objects and plain values."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fabric_core import resuming
from fabric_core.contracts.precision import Precision
from fabric_core.contracts.strategy import Strategy
from fabric_core.data.loader import FabricDataLoader
from fabric_core.errors import (
    CheckpointError,
    CheckpointKeyError,
    ConfigurationError,
    WrongTypeError,
    listing,
)
from fabric_core.places import Place, place_of
from fabric_core.sharded.remainder import Remainder, is_postponed, postponed, read_now
from fabric_core.sharded.stored import plain
from fabric_core.wrappers.face import unwrap

OWN_KEY = "__fabric__"
"""Where a checkpoint holds what is not the user's: the state of the precision, and the random numbers of all ranks."""

Filter = Mapping[str, Callable[[str, Any], bool]]


def path_and_state(one: Any, other: Any) -> tuple[Place, Any]:
    """Tell a path from a state, in either order.

    Raises:
        WrongTypeError: Neither, or both, is a path.
    """
    paths = [value for value in (one, other) if isinstance(value, str | os.PathLike)]
    if len(paths) != 1:
        raise WrongTypeError(
            f"A path and a state are needed, in either order; got a {type(one).__name__} and a {type(other).__name__}."
        )
    return place_of(paths[0]), other if paths[0] is one else one


def collect(state: Any, strategy: Strategy, precision: Precision, keep: Filter | None) -> dict[str, Any]:
    """Everything in a state, turned into tensors and plain values. Called on every rank.

    Args:
        state: A dictionary with models, optimizers, objects with ``state_dict``, plain values and dictionaries of them.
        strategy, precision: Whose business part of the state is.
        keep: For a key of the state whose value is a dictionary in the end: which of its entries to save.
    """
    if not isinstance(state, Mapping):
        raise WrongTypeError(f"A state to save has to be a dictionary, not a {type(state).__name__}.")
    loaders = resuming.loaders_in(state)
    ranks = resuming.states_of_ranks(loaders, strategy) if loaders else []
    places = {
        id(loader): [rank["loaders"][number] for rank in ranks] for number, loader in enumerate(loaders)
    }
    collected = {key: _saved(value, strategy, places) for key, value in state.items()}
    for key, wanted in (keep or {}).items():
        collected[key] = _filtered(key, collected, wanted)
    own = {"precision": precision.state_dict(), "random": [rank["random"] for rank in ranks]}
    if any(own.values()) and _is_container(state):
        collected[OWN_KEY] = {name: part for name, part in own.items() if part}
    return collected


def restore(
    checkpoint: dict[str, Any],
    state: MutableMapping[str, Any],
    strategy: Strategy,
    precision: Precision,
    strict: bool,
) -> dict[str, Any]:
    """Put a checkpoint back into a state, in place. Called on every rank.

    Returns:
        What of the checkpoint the state did not ask for.

    Raises:
        CheckpointKeyError: ``strict``, and the checkpoint lacks something. Nothing has been restored then.
    """
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f"The checkpoint holds a {type(checkpoint).__name__}, not a dictionary of states."
        )
    missing = list(_missing(state, checkpoint, ""))
    if missing and strict:
        raise CheckpointKeyError(
            f"The checkpoint has no {listing(map(repr, missing))}. It has: {listing(map(repr, checkpoint))}. "
            "Leave the missing keys out of the state, or load with strict=False."
        )
    _restore_entries(state, checkpoint, "", strategy, strict)
    own = checkpoint.pop(OWN_KEY, {})
    if "precision" in own and _is_container(state):
        precision.load_state_dict(own["precision"])
    if "random" in own and resuming.loaders_in(state):
        resuming.restore_random(strategy.plain_value(own["random"]), strategy)
    return checkpoint


def left(rest: Any, where: Place, strategy: Strategy) -> dict[str, Any]:
    """What `restore` has left, as users get it. Called on every rank; to use it needs no other rank.

    Args:
        rest: Of a checkpoint that is open.
        where: Its place; what lies in shards is read from there when it is used.
        strategy: Makes everything else plain, now.
    """
    values = strategy.plain_value(postponed(rest))
    if type(values) is not dict:  # a state dict with attributes of its own
        whole: dict[str, Any] = read_now(values)
        return whole

    def read(key: Any, value: Any) -> Any:
        try:
            return where.read_again(value)
        except CheckpointError as error:
            raise CheckpointError(
                f"What the checkpoint {str(where)!r} has under {key!r} is read only now that it is used, and it cannot "
                f"be: {error} Use what load() returns before the checkpoint is replaced or deleted."
            ) from error

    return Remainder(values, read) if any(map(is_postponed, values.values())) else values


def restore_raw(checkpoint: Any, obj: Any, strategy: Strategy, strict: bool, name: str = "") -> None:
    """Put the bare state dict of one model or optimizer back.

    Args:
        checkpoint: The state dict.
        obj: Whose.
        strategy: Whose business it is.
        strict: Raise when the state dict lacks something, or has more.
        name: What it is called in the checkpoint; empty when it is all that there is.

    Raises:
        CheckpointError: The state dict is that of something else.
        WrongTypeError: ``obj`` is neither a model nor an optimizer.
    """
    if not isinstance(obj, nn.Module | Optimizer):
        raise WrongTypeError(f"load_raw restores a model or an optimizer, not a {type(obj).__qualname__}.")
    original = unwrap(obj)
    if not strategy.reads_stored_tensors:
        checkpoint = plain(checkpoint)
    what = f"The checkpoint's {name!r}" if name else "The checkpoint"
    try:
        if isinstance(obj, nn.Module):
            strategy.load_module_state_dict(original, checkpoint, strict=strict)
        else:
            strategy.load_optimizer_state_dict(original, checkpoint)
    except CheckpointError:  # of a strategy that reads only now: it is not about what fits
        raise
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        raise CheckpointError(
            f"{what} does not fit this {type(original).__name__}; what did fit may have been loaded. "
            f"{type(error).__name__}: {error}"
        ) from error


def _saved(value: Any, strategy: Strategy, places: Mapping[int, Any]) -> Any:
    value = _opened(value)
    if isinstance(value, nn.Module):
        return strategy.module_state_dict(unwrap(value))
    if isinstance(value, Optimizer):
        return strategy.optimizer_state_dict(unwrap(value))
    if isinstance(value, FabricDataLoader):
        return places[id(value)]
    if _is_logger(value):
        return value.state_dict() if _has_state(value) and strategy.global_rank == 0 else {}
    if not _is_container(value):
        if isinstance(value, DataLoader) and not _has_state(value):
            raise WrongTypeError(
                f"A {type(value).__name__} cannot be saved before it is set up: it does not know its place. Put into "
                "the state what setup_dataloaders() returns."
            )
        return value.state_dict() if _has_state(value) else value
    if isinstance(value, Mapping):
        return {key: _saved(entry, strategy, places) for key, entry in value.items()}
    return [_saved(entry, strategy, places) for entry in value]


def _missing(state: Mapping[Any, Any], saved: Any, inside: str) -> Iterator[str]:
    """What a state asks for and a checkpoint lacks, by dotted names."""
    if not isinstance(saved, Mapping):
        name = inside.rstrip(".")
        raise CheckpointError(
            f"The checkpoint holds a {type(saved).__name__} as {name!r}, where the state has a collection."
        )
    for key, each in state.items():
        value = _opened(each)
        if key not in saved:
            yield f"{inside}{key}"
        elif _is_container(value):
            yield from _missing(_entries(value), _entries(saved[key]), f"{inside}{key}.")


def _restore_entries(
    state: Any, saved: dict[Any, Any], inside: str, strategy: Strategy, strict: bool
) -> None:
    """Restore every entry of a state, and take it out of the checkpoint."""
    for key, each in list(_entries(state).items()):
        if key not in saved:
            continue
        value = _opened(each)
        name, rest = f"{inside}{key}", saved.pop(key)
        if isinstance(value, nn.Module | Optimizer):
            restore_raw(rest, value, strategy, strict, name)
        elif isinstance(value, FabricDataLoader):
            resuming.restore_place(value, strategy.plain_value(rest), strategy)
        elif _is_container(value):
            rest = dict(_entries(rest))
            _restore_entries(value, rest, f"{name}.", strategy, strict)
            if rest:
                saved[key] = rest
        elif _is_logger(value):
            plain_state = strategy.plain_value(rest)
            if _has_state(value) and strategy.global_rank == 0:
                value.load_state_dict(plain_state)
        elif _has_state(value):
            value.load_state_dict(strategy.plain_value(rest))
        elif isinstance(state, MutableMapping | list):
            state[key] = strategy.plain_value(rest)
        else:
            raise WrongTypeError(
                f"The value {name!r} cannot be replaced inside of a {type(state).__name__}. Use a dictionary or a list."
            )


def _opened(value: Any) -> Any:
    """What an object says that its state consists of, with ``state_parts``; any other value is returned as it is.

    Models in it are then saved and loaded in the way of the strategy, which a ``state_dict`` of their tensors is not.
    """
    parts = getattr(type(value), "state_parts", None)
    return parts(value) if callable(parts) else value


def _is_logger(value: Any) -> bool:
    """Whether something is used on rank 0 only, has its state there, and may have none: loggers need not be ours."""
    return callable(getattr(type(value), "log_metrics", None))


def _entries(value: Any) -> Any:
    return dict(enumerate(value)) if isinstance(value, list | tuple) else value


def _has_state(value: Any) -> bool:
    methods = (getattr(type(value), name, None) for name in ("state_dict", "load_state_dict"))
    return all(map(callable, methods))


def _is_container(value: Any) -> bool:
    """Whether a value is a collection with something stateful in it; any other collection is a plain value."""
    if _has_state(value) or not isinstance(value, Mapping | list | tuple):
        return False
    entries = value.values() if isinstance(value, Mapping) else value
    return any(
        _has_state(entry) or _is_logger(entry) or _opened(entry) is not entry or _is_container(entry)
        for entry in entries
    )


def _filtered(key: str, collected: dict[str, Any], wanted: Callable[[str, Any], bool]) -> dict[str, Any]:
    if key not in collected:
        raise ConfigurationError(
            f"filter= names {key!r}, but the state has only {listing(map(repr, collected))}."
        )
    if not callable(wanted):
        raise WrongTypeError(f"filter[{key!r}] has to be a function of a name and a value, not {wanted!r}.")
    if not isinstance(collected[key], Mapping):
        raise WrongTypeError(f"filter[{key!r}] cannot be applied: what is saved under it is no dictionary.")
    return {name: value for name, value in collected[key].items() if wanted(name, value)}
