"""Checks and small steps of ``setup``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from torch import nn
from torch.optim import Optimizer

from fabric_core.errors import SetupError, WrongTypeError
from fabric_core.wrappers.face import is_wrapped


def check_not_wrapped(verb: str, *objects: Any) -> None:
    """Refuse what came out of a set-up already.

    Raises:
        SetupError: One of the objects did.
    """
    for obj in objects:
        if is_wrapped(obj):
            name = type(obj).__name__.removeprefix("Fabric")
            raise SetupError(f"The {name} passed to {verb}() was set up before. Set each object up once.")


class SetUp:
    """What one ``Fabric`` has set up. A model or optimizer that is set up twice would be synchronised twice."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def check(self, verb: str, *objects: Any) -> None:
        """Refuse what was noted.

        Raises:
            SetupError: One of the objects was, or is given twice.
        """
        for index, obj in enumerate(objects):
            if self._known.get(id(obj)) is obj or any(obj is other for other in objects[:index]):
                raise SetupError(
                    f"The {type(obj).__name__} passed to {verb}() was set up before. Set each object up once, and go "
                    "on with what that returned."
                )

    def note(self, *objects: Any) -> None:
        """Note what is ready; what failed halfway may be tried again."""
        for obj in objects:
            self._known[id(obj)] = obj

    def __reduce__(self) -> tuple[Any, ...]:
        return SetUp, ()  # what the parent of a launch has noted means nothing in another process


def check_model(verb: str, model: Any) -> None:
    """Refuse what is no model, and what was set up before, compiled since or not.

    Raises:
        WrongTypeError: It is no module.
        SetupError: It was set up before.
    """
    if not isinstance(model, nn.Module):
        raise WrongTypeError(f"{verb}() takes a torch.nn.Module, not a {type(model).__qualname__}.")
    check_not_wrapped(verb, without_compile(model, reapply=False)[0])


def check_optimizer(verb: str, optimizer: Any) -> None:
    """Refuse what is no optimizer, was set up before, or is one of parameters that have no memory yet.

    Raises:
        WrongTypeError: It is no optimizer.
        SetupError: It was set up before, or holds parameters on the meta device.
    """
    check_not_wrapped(verb, optimizer)
    if not isinstance(optimizer, Optimizer):
        advice = " A scheduler is given by name: scheduler=…." if hasattr(optimizer, "get_last_lr") else ""
        raise WrongTypeError(
            f"{verb}() takes optimizers of torch.optim, not a {type(optimizer).__qualname__}.{advice}"
        )
    if any(parameter.is_meta for group in optimizer.param_groups for parameter in group["params"]):
        raise SetupError(
            f"The {type(optimizer).__name__} holds parameters on the meta device, which have no values. Make the "
            "optimizer after the model got its memory: set the model up first (setup_module), then make the optimizer "
            "and call setup_optimizers."
        )


def without_compile(model: nn.Module, reapply: bool) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    """Take a compiled model apart.

    Returns:
        The plain model, and a function that compiles another module in the same way (or leaves it as it is).
    """
    dynamo = sys.modules.get("torch._dynamo")
    compiled: Any = getattr(dynamo, "OptimizedModule", None)
    if compiled is None or not isinstance(model, compiled):
        return model, _unchanged
    context: Any = model.dynamo_ctx
    original: Any = model._orig_mod
    return original, (context if reapply else _unchanged)


def _unchanged(module: nn.Module) -> nn.Module:
    return module
