"""Checks and small steps of ``setup``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fabric_core.errors import SetupError
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


def check_parameters(optimizer: Optimizer) -> None:
    """Refuse an optimizer of parameters that have no memory yet.

    Raises:
        SetupError: It holds parameters on the meta device.
    """
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
