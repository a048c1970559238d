"""Activation checkpointing: what a module has computed is not kept for the backward pass, but computed again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from fabric_backends.sharding.units import check_classes, chosen_by

Recomputed = bool | Callable[[nn.Module], bool] | Collection[type[nn.Module]]
"""``True`` for the units, the classes of the modules that are recomputed, or a function that says it of a module."""


def check_recomputed(value: Any) -> None:
    """Make sure that the option can be meant.

    Raises:
        OptionsError: It cannot.
    """
    if not isinstance(value, bool) and not callable(value):
        check_classes("activation_checkpointing", value, "True, False")


def recompute(asked: Any, model: nn.Module, units: list[nn.Module]) -> None:
    """Let some modules inside of a model recompute. Called on every rank, before the model is sharded.

    Only the ``forward`` of each is replaced, on the instance, so that the names of parameters stay as they are.

    Args:
        asked: See `Recomputed`.
        model: The model.
        units: Its units, the model itself last.
    """
    if asked is False:
        return
    modules = units[:-1] if asked is True else list(chosen_by(asked, model))
    if not modules:
        warnings.warn(
            f"activation_checkpointing has found nothing to recompute in the {type(model).__name__}: "
            + ("it has no units inside." if asked is True else "no module of it is what was asked for."),
            UserWarning,
            stacklevel=2,
        )
    for module in modules:
        forward: Any = partial(checkpoint, module.forward, use_reentrant=False)
        module.forward = forward
