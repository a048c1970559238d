"""Finding the linear layers of a model, and putting others in their place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

_HOOKS = ("_forward_", "_backward_", "_is_full_backward_hook")


def each_layer(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, Any]]:
    """Every module of one of the classes, with its name; of classes derived from them, none.

    Those (a layer of `torch.nn.MultiheadAttention` is one) are known to others by more than their forward pass.
    """
    for name, module in model.named_modules():
        if type(module) in kinds:
            yield name, module


def has_layers_of(model: nn.Module, package: str) -> bool:
    """Whether the model has layers of a package already: put there by the user, or when it was set up before."""
    return any(type(module).__module__.partition(".")[0] == package for module in model.modules())


def is_ignored(name: str, ignored: Iterable[str]) -> bool:
    """Whether a name is that of an ignored module, or of one inside of it (``"head"``, ``"blocks.3.mlp"``)."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in ignored)


def replace_layers(model: nn.Module, layers: dict[str, Any], make: Callable[[Any], nn.Module]) -> nn.Module:
    """Put another module in the place of each layer, in place.

    Args:
        model: The model.
        layers: Those to be replaced, by name.
        make: Makes what takes the place of one. Its hooks and mode are taken over here.

    Returns:
        The model; what took its place when it is itself a layer.
    """
    made = {layer: _alike(make(layer), layer) for layer in layers.values()}
    if model in made:
        return made[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # a layer may have several names, in several places
            if child is not None and child in made:
                setattr(parent, name, made[child])
    return model


def _alike(new: nn.Module, old: nn.Module) -> nn.Module:
    for name, theirs in vars(old).items():
        if name.startswith(_HOOKS):
            if isinstance(theirs, dict):
                theirs.update(vars(new)[name])  # their object stays: the handles of their hooks refer to it
            vars(new)[name] = theirs
    return new.train(old.training)


def warn_of_layers_left(left: list[str], why: str) -> None:
    """Say once which layers stay as they are, so that nobody takes them for converted."""
    if left:
        shown = ", ".join(repr(name) for name in left[:5]) + (" and others" if len(left) > 5 else "")
        warnings.warn(
            f"{len(left)} linear layer(s) stay in 16 bits, because {why}: {shown}. To leave them so without this "
            "warning, name them in ignore_modules.",
            UserWarning,
            stacklevel=4,
        )
