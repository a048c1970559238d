"""Optimizers follow the parameters of a model when sharding puts new ones in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from fabric_backends.sharding.tensors import is_sharded, sharded_like
from fabric_core.errors import SetupError


class Rebinding:
    """Knows which parameter has taken the place of which, and lets optimizers go on with the new ones.

    Optimizers and models may come in any order: an optimizer that is known follows every model that is sharded later,
    and one that comes later follows those that were sharded before. State that an optimizer has already (loaded, or
    made by its constructor) is sharded as its parameters are.
    """

    def __init__(self) -> None:
        self._successors: Any = WeakIdKeyDictionary()  # of parameters that somebody still holds
        self._optimizers: WeakSet[Optimizer] = WeakSet()

    def __reduce__(self) -> tuple[Any, ...]:
        return Rebinding, ()  # what the parent of a launch knows means nothing in another process

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        """While this is open, the parameters of ``module`` may be replaced. Called on every rank."""
        before = dict(module.named_parameters(remove_duplicate=False))
        yield
        after = dict(module.named_parameters(remove_duplicate=False))
        for name, parameter in before.items():
            successor = after.get(name)
            if successor is not None and successor is not parameter:
                self._successors[parameter] = successor
        for optimizer in list(self._optimizers):
            self._rebind(optimizer)

    def follow(self, optimizer: Optimizer) -> None:
        """Let an optimizer follow, now and from now on. Called on every rank.

        Raises:
            SetupError: It has state for a parameter that cannot be sharded as the parameter is.
        """
        self._optimizers.add(optimizer)
        self._rebind(optimizer)

    def _rebind(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            parameters = group["params"]
            for index, parameter in enumerate(parameters):
                successor = self._successors.get(parameter)
                if successor is not None:
                    parameters[index] = successor
                    _move_state(optimizer, parameter, successor)


def _move_state(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    state = optimizer.state.pop(old, None)
    if state is not None:
        optimizer.state[new] = {name: _sharded(optimizer, name, value, new) for name, value in state.items()}


def _sharded(optimizer: Optimizer, name: str, value: Any, parameter: nn.Parameter) -> Any:
    if not isinstance(value, Tensor) or not is_sharded(parameter) or is_sharded(value):
        return value
    if value.shape == parameter.shape:
        return sharded_like(value, parameter)
    if value.numel() == 1:  # a number of steps
        return value
    raise SetupError(
        f"The {type(optimizer).__name__} has state already ({name!r}, of shape {tuple(value.shape)}) that cannot be "
        f"sharded like its parameter of shape {tuple(parameter.shape)}. Set the model and the optimizer up before the "
        "first step; a checkpoint is loaded after that."
    )
