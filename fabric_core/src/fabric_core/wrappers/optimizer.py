"""The optimizer that ``setup`` returns: the user's own, whose step goes through precision and strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from fabric_core.wrappers.face import Face, put_on

if TYPE_CHECKING:
    from fabric_core.accumulation import Accumulation
    from fabric_core.contracts.strategy import Strategy

    class _Base(Face, Optimizer):
        pass

else:
    _Base = Face


class FabricOptimizer(_Base):
    """An optimizer that was set up. It is an instance of the user's class, and shares all its attributes.

    Inside ``fabric.accumulate``, ``step`` and ``zero_grad`` do nothing until the window is full. Pickled or copied,
    it is the plain optimizer.
    """

    __slots__ = ("_accumulation", "_notify", "_patched_step", "_strategy")
    _strategy: Strategy
    _accumulation: Accumulation
    _notify: Callable[[Optimizer], None]
    _patched_step: Callable[..., Any] | None

    @property
    def step(self) -> Callable[..., Any]:
        """Step, unless a window of ``fabric.accumulate`` is still open. Takes the user's closure, if any.

        A property, because learning-rate schedulers replace the method on the instance; what they put there belongs
        to this face and not to the user's optimizer, whose own ``step`` is what is called in the end.
        """
        return self._patched_step or self._step

    @step.setter
    def step(self, value: Callable[..., Any]) -> None:
        self._patched_step = value

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self._accumulation.is_open:
            return None
        original = self._original
        result = self._strategy.optimizer_step(original, original.step, closure)
        self._notify(self)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, unless a window of ``fabric.accumulate`` is still open."""
        if not self._accumulation.is_open:
            self._original.zero_grad(set_to_none=set_to_none)


def wrap_optimizer(
    original: Optimizer, strategy: Strategy, accumulation: Accumulation, notify: Callable[[Optimizer], None]
) -> FabricOptimizer:
    """Give an optimizer its second face.

    Args:
        original: The user's optimizer, or what the strategy made of it.
        strategy: Steps it.
        accumulation: Knows whether a window is open.
        notify: Called after each step that was taken.
    """
    face = put_on(FabricOptimizer, original)
    face._strategy, face._accumulation, face._notify = strategy, accumulation, notify
    face._patched_step = None
    return face
