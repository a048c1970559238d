"""The model that ``setup`` returns: the user's own, whose forward passes go through precision and strategy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fabric_core.errors import SetupError, WrongTypeError
from fabric_core.wrappers.face import Face, put_on
from fabric_core.wrappers.guard import no_bypass

if TYPE_CHECKING:
    from fabric_core.contracts.precision import Precision

    class _Base(Face, nn.Module):
        pass

else:
    _Base = Face

STEP_METHODS = ("training_step", "validation_step", "test_step", "predict_step")
"""Methods that are forward passes by their name, and need not be marked."""


class FabricModule(_Base):
    """A model that was set up. It is an instance of the class of the user's model, and shares all its attributes.

    Calling it runs the forward pass through the strategy. Methods of the user's class run as they are, with the
    set-up model as ``self``, so that a call to ``self(...)`` inside them goes through the strategy as well.
    ``state_dict`` has the keys of the user's model. Pickled or copied, it is the user's plain model.

    Attributes:
        device: Where its first parameter is, unless the user's class has such an attribute.
        dtype: The dtype of its first floating-point parameter, unless the user's class has such an attribute.
        module: The user's own model, unless the user's class has such an attribute.
    """

    __slots__ = ("_call", "_depth", "_forward_methods", "_forward_module", "_wraps")
    _call: Callable[..., Any]
    _depth: int
    _forward_methods: set[str]
    _forward_module: nn.Module
    _wraps: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass through precision and strategy."""
        return self._call(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as calling the model: the strategy is not passed by."""
        return self._call(*args, **kwargs)

    def mark_forward_method(self, method: str | Callable[..., Any]) -> None:
        """Declare that a method is a forward pass of its own, to be run through precision and strategy.

        Args:
            method: Its name, or the bound method.

        Raises:
            SetupError: The model has no such method.
        """
        name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
        if not callable(getattr(type(self._original), name, None)) or name == "forward":
            raise SetupError(
                f"{type(self._original).__name__} has no method {name!r} that could be marked as a forward method."
            )
        self._forward_methods.add(name)

    def __getattr__(self, name: str) -> Any:
        try:
            return type(self._original).__getattr__(self, name)
        except AttributeError:
            if name in _OFFERED:
                return _OFFERED[name](self)
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._original, name)


_OFFERED: dict[str, Callable[[FabricModule], Any]] = {
    "module": lambda module: module._original,
    "device": lambda module: next((p.device for p in module.parameters()), torch.device("cpu")),
    "dtype": lambda module: next(
        (p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype()
    ),
}
_set = object.__setattr__  # FabricModule.__setattr__ writes to the user's model


def wrap_module(original: nn.Module, forward_module: nn.Module, precision: Precision) -> FabricModule:
    """Give a model its second face.

    Args:
        original: The user's model.
        forward_module: What the strategy made of it; forward passes go through this.
        precision: Converts what goes in and what comes out.
    """
    if not isinstance(original, nn.Module):
        raise WrongTypeError(f"A torch.nn.Module is needed here, not a {type(original).__qualname__}.")
    cls: Any = type(original)
    face = put_on(_face_for(cls), original)
    _set(face, "_forward_module", forward_module)
    _set(face, "_forward_methods", {name for name in STEP_METHODS if hasattr(type(original), name)})
    _set(face, "_wraps", forward_module is not original)
    _set(face, "_depth", 0)
    run = precision.wrap_forward(forward_module)
    _set(face, "_call", _counted(face, run) if face._wraps else run)
    return face


def _counted(face: FabricModule, run: Callable[..., Any]) -> Callable[..., Any]:
    """Note while the strategy's forward pass is running, for the watch over methods."""

    def call(*args: Any, **kwargs: Any) -> Any:
        _set(face, "_depth", face._depth + 1)
        try:
            return run(*args, **kwargs)
        finally:
            _set(face, "_depth", face._depth - 1)

    return call


@functools.cache
def _face_for(cls: Any) -> type[FabricModule]:
    """The mixin for one class of models, with a watched version of each method that the class adds to ``nn.Module``."""
    methods = {
        name: _watched(name, function)
        for name, function in inspect.getmembers(cls, inspect.isfunction)
        if not hasattr(nn.Module, name) and not hasattr(FabricModule, name)
    }
    body = {"__slots__": (), "__doc__": FabricModule.__doc__, "__module__": __name__, **methods}
    return type("FabricModule", (FabricModule,), body)


def _watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def method(self: FabricModule, *args: Any, **kwargs: Any) -> Any:
        if self._depth:
            return function(self, *args, **kwargs)
        if name in self._forward_methods:
            return _through_forward(self, function, args, kwargs)
        if not self._wraps:
            return function(self, *args, **kwargs)
        with no_bypass(self._original, name, lambda: self._depth):
            return function(self, *args, **kwargs)

    return method


def _through_forward(
    face: FabricModule, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a method in the place of ``forward``, so that it passes through everything a forward pass passes through.

    The strategy calls the user's module, whose ``forward`` is the method for this one call; a ``forward`` that the
    method itself asks for is the true one again.
    """
    original, instance_forward = face._original, vars(face._original).get("forward")

    def restore() -> None:
        vars(original).pop("forward", None)
        if instance_forward is not None:
            vars(original)["forward"] = instance_forward

    def stand_in(*inner_args: Any, **inner_kwargs: Any) -> Any:
        restore()
        return function(original, *inner_args, **inner_kwargs)

    vars(original)["forward"] = stand_in
    try:
        return face._call(*args, **kwargs)
    finally:
        restore()
