"""Gradient accumulation: windows of micro-batches, at the end of which gradients are synchronised and applied."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fabric_core.data.iteration import Iteration, LoaderTracker
from fabric_core.errors import ConfigurationError, SetupError

if TYPE_CHECKING:
    from torch import Tensor

    from fabric_core.wrappers.optimizer import GradientState


@dataclass(eq=False)
class Window:
    """The micro-batches between two steps of one model.

    Attributes:
        length: How many micro-batches it has in all: ``every``, or fewer when the loader ends before.
        index: The number of the current one, from 0.
        correction: What the gradients collected so far have to be multiplied with, because the window became shorter
            than it was when their losses were divided (the loop was left early, or a batch was dropped); mostly 1.
        has_loss: Whether ``backward`` was called in the current micro-batch. One without does not count.
        done: Whether the current micro-batch is over, and counts.
        loop: The loop whose end makes the window shorter; chosen when the window begins.
        seen: How many batches there had been in all at the last micro-batch.
        pending: Whether ``backward`` was called in it, and no optimizer was asked to step since.
        outer: The window around this one.
    """

    length: int = 1
    index: int = 0
    correction: float = 1.0
    has_loss: bool = False
    done: bool = False
    loop: Iteration | None = None
    seen: int = 0
    pending: bool = False
    outer: Window | None = None

    @property
    def is_full(self) -> bool:
        """Whether the current micro-batch is the last one: gradients are synchronised, and optimizers step.

        After the block it tells the same of the micro-batch that was the current one.
        """
        return self.index + 1 >= self.length


class Accumulation:
    """The windows of one ``Fabric``, by the models that they are for.

    Attributes:
        active: The window of the innermost ``with fabric.accumulate(…)`` that is running.
    """

    def __init__(self, tracker: LoaderTracker) -> None:
        self.active: Window | None = None
        self._tracker = tracker
        self._windows: dict[tuple[weakref.ref[Any], ...], Window] = {}

    @property
    def is_open(self) -> bool:
        """Whether a window is running that is not full yet, so that optimizers have to wait."""
        return self.active is not None and not self.active.is_full

    def warn_if_open(self) -> None:
        """Say that a checkpoint to go on from is saved in the middle of a window. Called by ``save``."""
        around = list(self._around())
        if any(not window.is_full and (window.done or window in around) for window in self._windows.values()):
            warnings.warn(
                "A checkpoint to go on from is saved in the middle of a window of fabric.accumulate: gradients are not "
                "saved, so the micro-batches of this window are lost to a run that is resumed. Save when the window is "
                "full: with fabric.accumulate(...) as window: …; if window.is_full: fabric.save(...).",
                UserWarning,
                stacklevel=4,
            )

    def share(self, loss: Tensor) -> Tensor:
        """What a loss contributes: its part of the window's mean. Called before each backward pass."""
        window = self.active
        if window is None:
            return loss
        around: Window | None = window
        while around is not None:
            around.has_loss = around.pending = True
            around = around.outer
        return loss if window.length == 1 else loss / window.length

    def lets_step(self, gradients: GradientState, closure: Callable[[], Any] | None) -> bool:
        """Whether an optimizer steps now. Called when it is asked to.

        Raises:
            SetupError: Its gradients cannot be those of the window.
        """
        full = True
        if self.active is not None and self.active.length > 1:
            full = self.active.is_full
            _check_step(self.active, closure)
            around: Window | None = self.active
            while around is not None:
                around.pending = False
                around = around.outer
        gradients.applied, gradients.waiting = full, not full
        return full

    def lets_zero(self, gradients: GradientState) -> bool:
        """Whether an optimizer drops its gradients now. Called when it is asked to.

        Loops do so after the step, or first of all; either way, what waits for the end of the window has to stay.
        """
        window = self.active
        if window is None or window.length == 1 or gradients.applied:
            drops = True
        elif window.pending:
            drops = window.is_full
        else:
            drops = window.index == 0 and not gradients.waiting
        if drops:
            gradients.applied = gradients.waiting = False
        return drops

    def begin(self, models: Iterable[Any], every: int, loader: Any = None) -> Window:
        """Begin one micro-batch in the window of some models; `end` has to follow.

        Raises:
            ConfigurationError: ``every`` is no whole number from 1.
            SetupError: The window is running already.
        """
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigurationError(
                f"accumulate(every={every!r}) has to be a whole number of batches, from 1."
            )
        window = self._window_of(models)
        if self.active is not None and window in self._around():
            raise SetupError(
                "fabric.accumulate was entered for a model inside of its own fabric.accumulate block."
            )
        if window.done:
            window.index = 0 if window.is_full else window.index + 1
        self._measure(window, every, loader)
        window.outer, self.active = self.active, window
        window.has_loss = window.pending = window.done = False
        return window

    def end(self, window: Window, failed: bool) -> None:
        """End the micro-batch; one that has failed does not count."""
        self.active, window.outer = window.outer, None
        window.done = window.has_loss and not failed

    def _window_of(self, models: Iterable[Any]) -> Window:
        """Found by weak references: a model that is gone leaves its window to no other that gets its address."""
        key = tuple(map(weakref.ref, models))
        if key not in self._windows:
            alive = {
                models: window
                for models, window in self._windows.items()
                if all(model() is not None for model in models)
            }
            self._windows = {**alive, key: Window(length=0)}
        return self._windows[key]

    def _around(self) -> Iterator[Window]:
        window = self.active
        while window is not None:
            yield window
            window = window.outer

    def _measure(self, window: Window, every: int, loader: Any) -> None:
        """A loader that ends before the window is full makes it shorter; without a loader, we count alone."""
        planned = every if window.index == 0 else window.length
        tracker, done = self._tracker, window.index + 1
        if loader is not None:
            window.loop = tracker.of(loader)
        elif window.index == 0 or window.loop not in tracker.live:
            window.loop = tracker.advanced_since(window.seen)
        loop, window.seen = window.loop, tracker.batches
        window.length = planned if loop is None else done + loop.remaining(planned - done)
        window.correction = planned / window.length if window.index else 1.0


def _check_step(window: Window, closure: Callable[[], Any] | None) -> None:
    if closure is not None:
        raise SetupError(
            "optimizer.step(closure) cannot be used in fabric.accumulate: an optimizer that computes the loss by "
            "itself, maybe several times, cannot collect gradients over micro-batches. Let the closure loop over them."
        )
    if not window.has_loss:
        raise SetupError(
            "optimizer.step() was called in fabric.accumulate, but fabric.backward() was not, for this micro-batch. "
            "Call fabric.backward(loss) instead of loss.backward(): it divides the loss by the length of the window. "
            "To leave a batch out, leave the block before the step; it does not count then."
        )
