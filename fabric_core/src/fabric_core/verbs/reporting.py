"""Seeding, printing, calling back and logging."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from fabric_core.data import seed as seeds
from fabric_core.data.collections import to_scalars
from fabric_core.verbs.life import Life


class Reporting(Life):
    """What is said and called beside the training."""

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool = True, verbose: bool = False) -> int:
        """Seed Python, NumPy and PyTorch, the same on every rank. See `fabric_core.seed_everything`.

        Args:
            seed: From 0 to 2**32 - 1; ``None`` takes ``FABRIC_SEED``, or 0.
            workers: Seed the workers of loaders that are set up afterwards as well, each differently.
            verbose: Print the seed.

        Returns:
            The seed.
        """
        return seeds.seed_everything(seed, workers, verbose)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on local rank 0 of each node only. Arguments as for ``print``."""
        if self.local_rank == 0:
            print(*args, **kwargs)  # noqa: T201

    def call(self, hook: str, *args: Any, **kwargs: Any) -> None:
        """Call a method on every callback that has it, in order. Runs on whichever ranks call it.

        Args:
            hook: The method's name.
            args: For the method.
            kwargs: For the method, as far as it takes them.
        """
        for callback in self.callbacks:
            method = getattr(callback, hook, None)
            if method is None:
                continue
            if not callable(method):
                warnings.warn(
                    f"The callback {type(callback).__name__} has an attribute {hook!r} that is not callable; skipped.",
                    UserWarning,
                    stacklevel=2,
                )
                continue
            method(*args, **_accepted(method, kwargs))

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Send one metric to every logger. Acts on global rank 0; may be called on every rank.

        Args:
            name: What it is called.
            value: A number, or a tensor of one element.
            step: The training step that it belongs to.
        """
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send several metrics to every logger. As `log`.

        Raises:
            ConfigurationError: A value has several elements.
        """
        if self.is_global_zero and self.loggers:
            numbers, at = to_scalars(metrics), to_scalars({"step": step})["step"]
            for logger in self.loggers:
                logger.log_metrics(metrics=numbers, step=at)

    def _after_step(self, optimizer: Optimizer) -> None:
        if self.callbacks:
            self.call("on_after_optimizer_step", strategy=self.strategy, optimizer=optimizer)


def _accepted(method: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of ``kwargs`` that a method takes."""
    if not kwargs:
        return kwargs
    try:
        parameters = inspect.signature(method).parameters.values()
    except (ValueError, TypeError):  # a method written in C says nothing of its arguments
        return kwargs
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return kwargs
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in kwargs.items() if name in by_name}
