"""The verbs of a training step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.accumulation import Accumulation, Window
from fabric_core.contracts.strategy import Strategy
from fabric_core.errors import ConfigurationError, WrongTypeError
from fabric_core.verbs.reporting import Reporting
from fabric_core.wrappers.face import unwrap
from fabric_core.wrappers.module import FabricModule, forward_module_of


class Step(Reporting):
    """Backward passes, clipping, accumulation."""

    def backward(self, loss: Tensor, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Compute gradients: ``loss.backward()``, in the way of precision and strategy. Called on every rank.

        Inside `accumulate`, the loss is divided by the number of micro-batches in the window.

        Args:
            loss: A scalar; any shape when ``gradient=`` is given.
            model: The set-up model that the loss comes from, where a strategy has to know it.
            args, kwargs: For ``torch.Tensor.backward``.
        """
        if not self._connected:
            self._require_launched("backward")
        if not isinstance(loss, Tensor):
            raise WrongTypeError(f"backward() takes the loss as a tensor, not a {type(loss).__qualname__}.")
        parts, guard = self._parts, self._guard
        loss = parts.precision.scale_loss(self._accumulation.share(loss))
        module = None if model is None else forward_module_of(model)
        if guard is None:
            parts.strategy.backward(loss, module, *args, **kwargs)
            return
        guard.inside = True
        try:
            parts.strategy.backward(loss, module, *args, **kwargs)
        finally:
            guard.inside = False

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool | None = None,
    ) -> Tensor | None:
        """Clip the gradients of an optimizer's parameters, in place, by value or by norm. Called on every rank.

        Gradients of a scaled loss are brought to their true size first. Inside a window of `accumulate` that is not
        full, nothing happens and ``None`` is returned.

        Args:
            module: The set-up model.
            optimizer: Whose parameters.
            clip_val: Clamp each element to ``[-clip_val, clip_val]``.
            max_norm: Scale all gradients so that their joint norm is at most this. Exactly one of the two.
            norm_type: The p of the p-norm; may be ``inf``.
            error_if_nonfinite: Raise when the norm is NaN or infinite. By default it raises, except where losses are
                scaled: there such a step is skipped anyway, and the scale lowered.

        Returns:
            With ``max_norm`` the norm before clipping, over all ranks: a 0-dimensional tensor.

        Raises:
            ConfigurationError: Not exactly one of ``clip_val`` and ``max_norm``.
            RuntimeError: The norm is not finite.
        """
        if (clip_val is None) == (max_norm is None):
            raise ConfigurationError(
                f"clip_gradients takes either clip_val or max_norm; got clip_val={clip_val}, max_norm={max_norm}."
            )
        self._require_launched("clip_gradients")
        if self._accumulation.is_open:
            return None
        precision, original = self._parts.precision, unwrap(optimizer)
        precision.unscale_gradients(original)
        parameters = [parameter for group in original.param_groups for parameter in group["params"]]
        forward_module = forward_module_of(module)
        if max_norm is None:
            self.strategy.clip_gradients_value(forward_module, parameters, float(clip_val or 0.0))
            return None
        strict = not precision.scales_loss if error_if_nonfinite is None else error_if_nonfinite
        return self.strategy.clip_gradients_norm(forward_module, parameters, max_norm, norm_type, strict)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of the precision's forward pass, for computations outside of a model."""
        self._require_launched("autocast")
        return self._parts.precision.forward_context()

    @contextmanager
    def no_backward_sync(self, model: nn.Module, enabled: bool = True) -> Iterator[None]:
        """A context in which gradients are not synchronised between ranks. Called on every rank.

        Forward and backward pass both have to be inside. Where the strategy cannot hold the synchronisation back,
        this does nothing, with one warning.

        Args:
            model: A set-up model.
            enabled: ``False`` makes it do nothing.

        Raises:
            WrongTypeError: The model is not set up.
        """
        _check_set_up("no_backward_sync", model)
        self._require_launched("no_backward_sync")
        held = self.strategy.hold_gradient_sync(forward_module_of(model)) if enabled else None
        if enabled and held is None and not self._warned_no_hold:
            self._warned_no_hold = True
            warnings.warn(
                f"The strategy {self.plan.strategy.name!r} cannot hold back the synchronisation of gradients; they are "
                "synchronised in every backward pass. The result is the same.",
                UserWarning,
                stacklevel=3,
            )
        if held is None:
            yield
        else:
            with held:
                yield

    def accumulate(
        self,
        model: nn.Module | Iterable[nn.Module],
        every: int,
        *,
        loader: Iterable[Any] | None = None,
    ) -> AbstractContextManager[Window]:
        """Run one micro-batch of a window of ``every``: the optimizer steps once per window. Called on every rank.

        Inside, ``backward`` divides the loss by the number of micro-batches in the window, and gradients are
        synchronised, clipped, applied (``optimizer.step``) and dropped (``optimizer.zero_grad``) only with the last
        of them. The last batch of the loader that is being looped over (one that was set up) ends a window early;
        the losses are then divided by the number that there really are. A window that is not full when its loop is
        left before the end goes on in the next loop. A micro-batch that fails, or in which ``backward`` is not called,
        does not count.

        Example:
            >>> for batch in loader:
            ...     with fabric.accumulate(model, every=8):
            ...         fabric.backward(loss_function(model(batch)))
            ...         optimizer.step()
            ...         optimizer.zero_grad()

        Args:
            model: A set-up model, or several that are trained in the same window.
            every: How many micro-batches make a window.
            loader: The loader whose last batch ends a window, where several are read at a time. By default the one
                whose loop began first.

        Returns:
            A context that gives the window; its ``is_full`` tells whether optimizers step in this micro-batch.

        Raises:
            ConfigurationError: ``every`` is no whole number from 1.
            WrongTypeError: A model is not set up.
            SetupError: A window inside of itself; or, from ``optimizer.step``, a closure, or no `backward` before it.
        """
        models = (model,) if isinstance(model, nn.Module) else tuple(model)
        for each in models:
            _check_set_up("accumulate", each)
        if not self._connected:
            self._require_launched("accumulate")
        return _MicroBatch(self._accumulation, self._parts.strategy, models, every, loader)


class _MicroBatch(AbstractContextManager[Window]):
    """One micro-batch of `Step.accumulate`. A class, because it is entered in every step."""

    __slots__ = ("_accumulation", "_arguments", "_held", "_models", "_strategy", "_window")

    def __init__(
        self, accumulation: Accumulation, strategy: Strategy, models: tuple[Any, ...], *arguments: Any
    ) -> None:
        self._accumulation, self._strategy = accumulation, strategy
        self._models, self._arguments = models, arguments

    def __enter__(self) -> Window:
        originals = [model._fabric_original for model in self._models]
        window = self._window = self._accumulation.begin(originals, *self._arguments)
        try:
            self._held = self._hold(window)
            self._held.__enter__()
        except BaseException:
            self._accumulation.end(window, failed=True)
            raise
        return window

    def __exit__(self, *error: Any) -> bool | None:
        failed = True
        try:
            swallowed = self._held.__exit__(*error)
            failed = error[0] is not None and not swallowed
        finally:
            self._accumulation.end(self._window, failed)
        return swallowed

    def _hold(self, window: Window) -> AbstractContextManager[Any]:
        """What the strategy wants the micro-batch to run in."""
        modules = [model._fabric_forward_module for model in self._models]
        if window.correction != 1.0:
            for module in modules:
                self._strategy.scale_gradients(module, window.correction)
        if len(modules) == 1:
            return self._strategy.accumulation_context(modules[0], window.is_full)
        return _all_of(self._strategy.accumulation_context(module, window.is_full) for module in modules)


@contextmanager
def _all_of(contexts: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _check_set_up(verb: str, model: Any) -> None:
    if not isinstance(model, FabricModule):
        raise WrongTypeError(f"{verb} needs a model that setup() returned, not a {type(model).__qualname__}.")
