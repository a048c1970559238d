"""What ``save`` and ``load`` do with a state: a dictionary of models, optimizers, stateful objects and plain values."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fabric_core.contracts.precision import Precision
from fabric_core.contracts.strategy import Strategy
from fabric_core.errors import (
    CheckpointError,
    CheckpointKeyError,
    ConfigurationError,
    WrongTypeError,
    listing,
)
from fabric_core.wrappers.face import unwrap

OWN_KEY = "__fabric__"
"""Where a checkpoint holds what is not the user's: the state of the precision."""

Filter = Mapping[str, Callable[[str, Any], bool]]


def path_and_state(one: Any, other: Any) -> tuple[Path, Any]:
    """Tell a path from a state, in either order.

    Raises:
        WrongTypeError: Neither, or both, is a path.
    """
    paths = [value for value in (one, other) if isinstance(value, str | os.PathLike)]
    if len(paths) != 1:
        raise WrongTypeError(
            f"A path and a state are needed, in either order; got a {type(one).__name__} and a {type(other).__name__}."
        )
    return checked_path(paths[0]), other if paths[0] is one else one


def checked_path(path: str | os.PathLike[str]) -> Path:
    """A local path.

    Raises:
        CheckpointError: It is the address of something remote.
    """
    text = os.fspath(path)
    if "://" in text:
        raise CheckpointError(f"Only local paths can be written and read, and {text!r} is none.")
    return Path(text)


def collect(state: Any, strategy: Strategy, precision: Precision, keep: Filter | None) -> dict[str, Any]:
    """Everything in a state, turned into tensors and plain values. Called on every rank.

    Args:
        state: A dictionary with models, optimizers, objects with ``state_dict``, plain values and dictionaries of them.
        strategy, precision: Whose business part of the state is.
        keep: For a key of the state whose value is a dictionary in the end: which of its entries to save.
    """
    if not isinstance(state, Mapping):
        raise WrongTypeError(f"A state to save has to be a dictionary, not a {type(state).__name__}.")
    collected = {key: _saved(value, strategy) for key, value in state.items()}
    for key, wanted in (keep or {}).items():
        collected[key] = _filtered(key, collected, wanted)
    own = precision.state_dict()
    if own and any(map(_is_stateful, state.values())):
        collected[OWN_KEY] = {"precision": own}
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
    missing = [key for key in state if key not in checkpoint]
    if missing and strict:
        raise CheckpointKeyError(
            f"The checkpoint has no {listing(map(repr, missing))}. It has: {listing(map(repr, checkpoint))}. "
            "Leave the missing keys out of the state, or load with strict=False."
        )
    for key in [key for key in state if key in checkpoint]:
        state[key] = _restored(state[key], checkpoint.pop(key), strategy, strict)
    own = checkpoint.pop(OWN_KEY, None)
    if own is not None and any(map(_is_stateful, state.values())):
        precision.load_state_dict(own["precision"])
    return checkpoint


def restore_raw(checkpoint: Any, obj: Any, strategy: Strategy, strict: bool) -> None:
    """Put the bare state dict of one model or optimizer back."""
    if isinstance(obj, nn.Module):
        strategy.load_module_state_dict(unwrap(obj), checkpoint, strict=strict)
    elif isinstance(obj, Optimizer):
        strategy.load_optimizer_state_dict(unwrap(obj), checkpoint)
    else:
        raise WrongTypeError(f"load_raw restores a model or an optimizer, not a {type(obj).__qualname__}.")


def _saved(value: Any, strategy: Strategy) -> Any:
    if isinstance(value, nn.Module):
        return strategy.module_state_dict(unwrap(value))
    if isinstance(value, Optimizer):
        return strategy.optimizer_state_dict(unwrap(value))
    if type(value) is dict:
        return {key: _saved(entry, strategy) for key, entry in value.items()}
    return value.state_dict() if _is_stateful(value) else value


def _restored(value: Any, saved: Any, strategy: Strategy, strict: bool) -> Any:
    """The value that belongs into the state: the same object, restored, or the saved plain value."""
    if isinstance(value, nn.Module | Optimizer):
        restore_raw(saved, value, strategy, strict)
        return value
    if type(value) is dict and any(map(_is_stateful, value.values())):
        return {
            key: _restored(entry, saved.get(key, entry), strategy, strict) for key, entry in value.items()
        }
    if _is_stateful(value):
        value.load_state_dict(saved)
        return value
    return saved


def _is_stateful(value: Any) -> bool:
    if type(value) is dict:
        return any(map(_is_stateful, value.values()))
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


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
