"""Stopping when a metric gets no better."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

from fabric_core.data.collections import to_scalars
from fabric_core.errors import ConfigurationError, did_you_mean, listing
from fabric_core.helpers.exchange import gather_numbers
from fabric_core.helpers.states import check_state

if TYPE_CHECKING:
    from fabric_core.fabric import Fabric

__all__ = ["EarlyStopping"]

Mode = Literal["min", "max"]
NonFinite = Literal["stop", "count", "raise"]


class EarlyStopping:
    """Says when a metric has not improved for a number of looks at it, on every rank alike. Put it into the state.

    Example:
        >>> early = EarlyStopping(fabric, patience=3)
        >>> state = {"model": model, "optimizer": optimizer, "early": early}
        >>> for epoch in range(epochs):
        ...     train()
        ...     if early.update(validate(), epoch):
        ...         break

    Args:
        fabric: Whose ranks stop together.
        patience: How many looks in a row without improvement are enough.
        mode: Whether smaller or larger is better.
        min_delta: By how much, at least, a value has to be better than the best one to be an improvement.
        baseline: What the first improvement has to be better than; any finite value when ``None``.
        threshold: A value at least as good as this is good enough: stop at once.
        non_finite: What NaN or an infinity means: ``"stop"`` at once, ``"count"`` it as a look without improvement, or
            ``"raise"``. It is never an improvement.

    Raises:
        ConfigurationError: An argument has a value that it cannot have.

    Attributes:
        best: The best value; ``None`` before the first improvement, also with a baseline.
        best_step: The step that was given with it; without steps, the number of the look, from 0.
        waited: How many looks in a row were without improvement.
        looks: How many there were.
        reason: Why to stop, as a sentence; empty as long as there is no reason.
    """

    def __init__(
        self,
        fabric: Fabric,
        *,
        patience: int = 3,
        mode: Mode = "min",
        min_delta: float = 0.0,
        baseline: float | None = None,
        threshold: float | None = None,
        non_finite: NonFinite = "stop",
    ) -> None:
        _check_word("mode", mode, get_args(Mode))
        _check_word("non_finite", non_finite, get_args(NonFinite))
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ConfigurationError(f"patience={patience!r} has to be a whole number from 1.")
        if not min_delta >= 0:
            raise ConfigurationError(
                f"min_delta={min_delta!r} cannot be negative: it is how much better a value has to be, in either mode."
            )
        self._fabric = fabric
        self._sign = 1.0 if mode == "min" else -1.0
        self._patience, self._min_delta = patience, min_delta
        self._baseline, self._threshold, self._non_finite = baseline, threshold, non_finite
        self.best: float | None = None
        self.best_step: int | None = None
        self.waited = 0
        self.looks = 0
        self.reason = ""

    @property
    def stopped(self) -> bool:
        """Whether there is a reason to stop; also after a resume."""
        return bool(self.reason)

    def update(self, value: Any, step: int | None = None) -> bool:
        """Look at the metric. Called on every rank with the same value, such as `Metrics.compute` gives.

        Args:
            value: A number, or a tensor of one element.
            step: What it belongs to: a step, an epoch.

        Returns:
            Whether to stop, the same on every rank.

        Raises:
            ConfigurationError: Ranks have different values; the value has several elements; or it is not finite and
                ``non_finite="raise"``.
        """
        plain = to_scalars({"value": value, "step": self.looks if step is None else step})
        number, step = self._agreed(float(plain["value"])), plain["step"]
        if self._non_finite == "raise" and not math.isfinite(number):
            raise ConfigurationError(f"EarlyStopping: the value at step {step} is {number}.")
        self.looks += 1
        if self._is_better(number):
            self.best, self.best_step, self.waited = number, step, 0
        else:
            self.waited += 1
        self.reason = self.reason or self._reason(number, step)
        return self.stopped

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        return {name: getattr(self, name) for name in _STATE} | {"patience": self._patience}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave. What ran out of patience goes on when it is given more than it had.

        Raises:
            CheckpointError: It is the state of something else.
        """
        check_state("EarlyStopping", state, (*_STATE, "patience"))
        for name in _STATE:
            setattr(self, name, state[name])
        if self.reason.startswith(_NO_BETTER) and self.waited < self._patience > state["patience"]:
            self.reason = ""

    def _agreed(self, number: float) -> float:
        numbers = [row[0] for row in gather_numbers(self._fabric, [number])]
        if len(set(map(repr, numbers))) > 1:  # as text, in which NaN equals itself
            shown = listing(f"{each!r} on rank {rank}" for rank, each in enumerate(numbers[:8]))
            raise ConfigurationError(
                f"EarlyStopping.update was called with different values: {shown}. The ranks would stop at different "
                "times, and wait for each other for ever. Reduce the value first: Metrics(fabric, …).compute(), or "
                "fabric.all_reduce(value)."
            )
        return number

    def _is_better(self, number: float) -> bool:
        if not math.isfinite(number):
            return False
        reference = self._baseline if self.best is None else self.best
        return reference is None or self._sign * (reference - number) > self._min_delta

    def _reason(self, number: float, step: int) -> str:
        finite = math.isfinite(number)
        if not finite and self._non_finite == "stop":
            return f"The value at step {step} is {number}."
        if finite and self._threshold is not None and self._sign * (self._threshold - number) >= 0:
            return f"The value at step {step} is {number}, which is as good as {self._threshold}."
        if self.waited >= self._patience:
            best = "there was none yet"
            if self.best is not None:
                best = f"it was {self.best} at step {self.best_step}"
            return f"{_NO_BETTER} the best for {self.waited} look(s), until step {step}; {best}."
        return ""


_STATE = ("best", "best_step", "waited", "looks", "reason")
_NO_BETTER = "Nothing was better than"


def _check_word(option: str, value: Any, words: tuple[str, ...]) -> None:
    if value not in words:
        raise ConfigurationError(
            f"{option}={value!r} is not known.{did_you_mean(str(value), words)} It takes: {listing(words)}."
        )
