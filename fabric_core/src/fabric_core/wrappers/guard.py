"""Catching what would train wrongly without a word: a bare ``loss.backward()``, a method that bypasses the strategy."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fabric_core.errors import SetupError

if TYPE_CHECKING:
    from torch import Tensor, nn


class BackwardGuard:
    """Watches that gradients come from ``fabric.backward`` where anything else would leave them wrong.

    It sits on the parameters, not on the outputs: there it costs nothing in the forward pass, and
    ``torch.autograd.grad``, which accumulates no gradient, stays free to use. A parameter has at most one guard, that
    of the ``Fabric`` which set it up last.

    Attributes:
        inside: Whether ``fabric.backward`` is running.
    """

    def __init__(self, reason: str) -> None:
        self.inside = False
        self._reason = reason

    def release(self) -> None:
        """Watch nothing any more."""
        for parameter, (guard, handle) in list(_watched().items()):
            if guard is self:
                handle.remove()
                del _watched()[parameter]

    def check(self, _: Tensor) -> None:
        """Called for each parameter whose gradient has changed.

        Raises:
            SetupError: ``fabric.backward`` is not what changed it.
        """
        if not self.inside:
            raise SetupError(
                f"loss.backward() was called directly, but {self._reason}. Call fabric.backward(loss) instead. "
                "To go on after this, drop the gradients that are there: optimizer.zero_grad()."
            )


def watch(module: nn.Module, guard: BackwardGuard | None) -> None:
    """Let this guard, or none, watch the parameters of a module that collect gradients, instead of any other."""
    watched = _watched()
    for parameter in module.parameters():
        _, handle = watched.pop(parameter, (None, None))
        if handle is not None:
            handle.remove()
        if guard is not None and parameter.requires_grad:
            register: Any = parameter.register_post_accumulate_grad_hook
            watched[parameter] = (guard, register(guard.check))


@functools.cache
def _watched() -> Any:
    """For each parameter its guard, and the handle of the hook."""
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


@contextmanager
def no_bypass(module: nn.Module, method: str, is_inside: Any) -> Iterator[None]:
    """Raise when a method of a set-up model computes with a layer of it, outside of the strategy's forward pass.

    Layers without parameters to be trained (a loss, a frozen encoder) have no gradients to lose.

    Args:
        module: The user's module.
        method: The name of the method, for the message.
        is_inside: Tells whether the strategy's forward pass is running.
    """
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    own = {id(part) for part in module.modules()}

    def check(part: nn.Module, _: Any) -> None:
        if id(part) in own and torch.is_grad_enabled() and not is_inside() and _learns(part):
            raise SetupError(
                f"{type(module).__name__}.{method}() calls {type(part).__name__}() outside of the forward pass of the "
                f"strategy, so gradients would not be synchronised. Call it through the model's forward, or declare it "
                f"once, after setup: model.mark_forward_method({method!r})."
            )

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _learns(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())
