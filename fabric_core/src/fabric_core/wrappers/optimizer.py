"""The optimizer that ``setup`` returns: the user's own, whose step goes through precision and strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from fabric_core.contracts.strategy import Strategy
from fabric_core.wrappers.direct import direct_step, direct_zero_grad
from fabric_core.wrappers.face import Face, put_on

if TYPE_CHECKING:
    from fabric_core.accumulation import Accumulation

    class _Base(Face, Optimizer):
        pass

else:
    _Base = Face


@dataclass
class GradientState:
    """What has become of the gradients of one optimizer.

    Attributes:
        applied: A step was taken with them, and they were not dropped since.
        waiting: They wait for the end of a window.
    """

    applied: bool = False
    waiting: bool = False


class FabricOptimizer(_Base):
    """An optimizer that was set up. It is an instance of the user's class, and shares all its attributes.

    Inside ``fabric.accumulate``, ``step`` does nothing until the window is full, and ``zero_grad`` drops no gradient
    that has not been applied, wherever in the loop it stands. Pickled or copied, it is the plain optimizer.
    """

    __slots__ = (
        "_fabric_accumulation",
        "_fabric_notify",
        "_fabric_originals_step",
        "_fabric_originals_zero_grad",
        "_fabric_state",
        "_fabric_step",
        "_fabric_strategy",
    )
    _fabric_strategy: Strategy
    _fabric_accumulation: Accumulation
    _fabric_notify: Callable[[Optimizer], None]
    _fabric_state: GradientState
    _fabric_step: Callable[..., Any] | None
    _fabric_originals_step: Callable[..., Any]  # [Note: direct steps], and likewise:
    _fabric_originals_zero_grad: Callable[..., None]

    @property
    def step(self) -> Callable[..., Any]:
        """Step, unless a window of ``fabric.accumulate`` is still open. Takes the user's closure, if any.

        A property, because learning-rate schedulers replace the method on the instance; what they put there belongs
        to this face and not to the user's optimizer, whose own ``step`` is what is called in the end.
        """
        return self._fabric_step or self._fabric_own_step

    @step.setter
    def step(self, value: Callable[..., Any]) -> None:
        self._fabric_step = value

    def _fabric_own_step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not self._fabric_accumulation.lets_step(self._fabric_state, closure):
            return None
        result = self._fabric_strategy.optimizer_step(
            self._fabric_original, self._fabric_originals_step, closure
        )
        self._fabric_notify(self)
        return result

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Drop the gradients, unless they wait for the end of a window of ``fabric.accumulate``."""
        if self._fabric_accumulation.lets_zero(self._fabric_state):
            self._fabric_strategy.zero_gradients(
                self._fabric_original, self._fabric_originals_zero_grad, *args, **kwargs
            )

    def _patch_step_function(self) -> None:
        """Called by ``__setstate__`` of PyTorch's optimizers, which would put a function around our property."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the optimizer. As ``torch.optim.Optimizer.load_state_dict``."""
        self._fabric_original.load_state_dict(state_dict)


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
    face._fabric_strategy, face._fabric_accumulation, face._fabric_notify = strategy, accumulation, notify
    face._fabric_state, face._fabric_step = GradientState(), None
    face._fabric_originals_step = direct_step(original)
    face._fabric_originals_zero_grad = direct_zero_grad(original)
    return face
