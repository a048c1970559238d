"""The model that ``setup`` returns: the user's own, whose forward passes go through precision and strategy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fabric_core.errors import SetupError, listing
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


class _Forward:
    """``model.forward``: a call of the model, with the signature of the user's own method."""

    def __get__(self, face: FabricModule | None, cls: Any) -> Any:
        if face is None:
            return cls.__bases__[1].forward if cls is not FabricModule else self
        return functools.wraps(face._fabric_original.forward)(lambda *args, **kwargs: face(*args, **kwargs))

    def __set__(self, face: FabricModule, value: Any) -> None:
        face._fabric_original.forward = value


@dataclass
class _Own:
    """What a set-up model has to itself.

    Attributes:
        guarded: Whether the strategy's forward pass does something that the model's methods could pass by.
        forward_methods: The names of the methods that are forward passes.
        depth: How many forward passes of the strategy are running, one inside the other.
    """

    guarded: bool
    forward_methods: set[str] = field(default_factory=set)
    depth: int = 0


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

    __slots__ = ("_fabric_call", "_fabric_forward_module", "_fabric_own")
    _fabric_call: Callable[..., Any]
    _fabric_forward_module: nn.Module
    _fabric_own: _Own

    forward: Any = _Forward()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass through precision and strategy."""
        return self._fabric_call(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the user's model in place; the strategy stays around it. As ``torch.nn.Module.compile``."""
        self._fabric_original.compile(*args, **kwargs)

    def mark_forward_method(self, method: str | Callable[..., Any]) -> None:
        """Declare that a method is a forward pass of its own, to be run through precision and strategy.

        Args:
            method: Its name, or the bound method.

        Raises:
            SetupError: The model's class has no such method, or it is one that returns before it has computed.
        """
        name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
        users = type(self._fabric_original)
        function = _own_methods(users).get(name)
        if function is None:
            raise SetupError(
                f"{users.__name__} has no method {name!r} that could be marked as a forward method. "
                f"It has: {listing(_own_methods(users))}."
            )
        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            raise SetupError(
                f"{users.__name__}.{name}() cannot be marked as a forward method: it returns at once and computes "
                "later, outside of the forward pass. Mark a method that it calls for each of its steps."
            )
        self._fabric_own.forward_methods.add(name)

    def __getattr__(self, name: str) -> Any:
        try:
            return type(self._fabric_original).__getattr__(self, name)
        except AttributeError:
            if name in _OFFERED:
                return _OFFERED[name](self)
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            users = type(self._fabric_original).__name__
            raise SetupError(
                f"The class of this {users} cannot be changed, as parametrizations do, because it was set up. Do it "
                "before fabric.setup(model, ...), so that the optimizer knows the new parameters, too."
            )
        setattr(self._fabric_original, name, value)

    def __prepare_scriptable__(self) -> Any:
        """Asked by ``torch.jit.script``, which compiles the user's model: its class, unlike ours, is plain code."""
        theirs = getattr(self._fabric_original, "__prepare_scriptable__", None)
        return self._fabric_original if theirs is None else theirs()

    def __delattr__(self, name: str) -> None:
        delattr(self._fabric_original, name)

    @classmethod
    def _fabric_body(cls, users: type) -> dict[str, Any]:
        """A watched version of each method that the user's class adds to ``nn.Module``."""
        return {name: _watched(name, function) for name, function in _own_methods(users).items()}


_OFFERED: dict[str, Callable[[FabricModule], Any]] = {
    "module": lambda module: module._fabric_original,
    "device": lambda module: next((p.device for p in module.parameters()), torch.device("cpu")),
    "dtype": lambda module: next(
        (p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype()
    ),
}
_set = object.__setattr__  # FabricModule.__setattr__ writes to the user's model


def wrap_module(
    original: nn.Module,
    forward_module: nn.Module,
    precision: Precision,
    compiled: Callable[[nn.Module], nn.Module] = lambda module: module,
    *,
    guards_methods: bool,
) -> FabricModule:
    """Give a model its second face.

    Args:
        original: The user's model.
        forward_module: What the strategy made of it; forward passes go through this.
        precision: Converts what goes in and what comes out.
        compiled: Compiles ``forward_module``.
        guards_methods: Whether methods that compute with a layer outside of the forward pass would be wrong.
    """
    face = put_on(FabricModule, original)
    steps = _own_methods(type(original)).keys() & set(STEP_METHODS)
    own = _Own(guards_methods, forward_methods=steps)
    run = precision.wrap_forward(compiled(forward_module))
    _set(face, "_fabric_own", own)
    _set(face, "_fabric_forward_module", forward_module)
    _set(face, "_fabric_call", _counted(own, run) if guards_methods else run)
    return face


def forward_module_of(module: nn.Module) -> nn.Module:
    """What the strategy made of a model that was set up; any other module is returned as it is."""
    return module._fabric_forward_module if isinstance(module, FabricModule) else module


def _counted(own: _Own, run: Callable[..., Any]) -> Callable[..., Any]:
    """Note while the strategy's forward pass is running, for the watch over methods.

    It does not hold the face: a cycle would keep the memory of a model until the next garbage collection.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        own.depth += 1
        try:
            return run(*args, **kwargs)
        finally:
            own.depth -= 1

    return call


def _own_methods(cls: type) -> dict[str, Callable[..., Any]]:
    """The plain methods that a class adds to ``nn.Module``; static and class methods are none."""
    found = {name: inspect.getattr_static(cls, name) for name in dir(cls)}
    return {
        name: function
        for name, function in found.items()
        if inspect.isfunction(function) and not hasattr(nn.Module, name) and not hasattr(FabricModule, name)
    }


def _watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def method(self: FabricModule, *args: Any, **kwargs: Any) -> Any:
        own = self._fabric_own
        if own.depth:
            return function(self, *args, **kwargs)
        if name in own.forward_methods:
            return _through_forward(self, function, args, kwargs)
        if not own.guarded:
            return function(self, *args, **kwargs)
        with no_bypass(self._fabric_original, name, lambda: own.depth):
            return function(self, *args, **kwargs)

    return method


def _through_forward(
    face: FabricModule, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a method in the place of ``forward``, so that it passes through everything a forward pass passes through.

    The strategy calls the user's module, whose ``forward`` is the method for this one call; a ``forward`` that the
    method itself asks for is the true one again.
    """
    original = face._fabric_original
    instance_forward = vars(original).get("forward")

    def restore() -> None:
        vars(original).pop("forward", None)
        if instance_forward is not None:
            vars(original)["forward"] = instance_forward

    def stand_in(*inner_args: Any, **inner_kwargs: Any) -> Any:
        restore()
        return function(original, *inner_args, **inner_kwargs)

    vars(original)["forward"] = stand_in
    try:
        return face._fabric_call(*args, **kwargs)
    finally:
        restore()
