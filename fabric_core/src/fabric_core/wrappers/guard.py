"""Catching what would train wrongly without a word: a bare ``loss.backward()``, a method that bypasses the strategy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fabric_core.errors import SetupError

if TYPE_CHECKING:
    from torch import Tensor, nn


class BackwardGuard:
    """Watches that gradients come from ``fabric.backward`` where anything else would leave them wrong.

    It sits on the parameters, not on the outputs: there it costs nothing in the forward pass, and
    ``torch.autograd.grad``, which accumulates no gradient, stays free to use.

    Attributes:
        inside: Whether ``fabric.backward`` is running.
    """

    def __init__(self, reason: str) -> None:
        self.inside = False
        self._reason = reason
        self._watched: set[int] = set()

    def watch(self, module: nn.Module) -> None:
        """Watch every parameter of a module that collects gradients."""
        for parameter in module.parameters():
            if parameter.requires_grad and id(parameter) not in self._watched:
                self._watched.add(id(parameter))
                register: Any = parameter.register_post_accumulate_grad_hook
                register(self._check)

    def _check(self, _: Tensor) -> None:
        if not self.inside:
            raise SetupError(
                f"loss.backward() was called directly, but {self._reason}. Call fabric.backward(loss) instead. "
                "To go on after this, drop the gradients that are there: optimizer.zero_grad()."
            )


@contextmanager
def no_bypass(module: nn.Module, method: str, is_inside: Any) -> Iterator[None]:
    """Raise when a method of a set-up model computes with a layer of it, outside of the strategy's forward pass.

    Args:
        module: The user's module.
        method: The name of the method, for the message.
        is_inside: Tells whether the strategy's forward pass is running.
    """
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    own = {id(part) for part in module.modules()}

    def check(part: nn.Module, _: Any) -> None:
        if id(part) in own and torch.is_grad_enabled() and not is_inside():
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
