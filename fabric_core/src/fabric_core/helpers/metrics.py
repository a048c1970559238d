"""Metrics over many batches and all ranks, which survive a restart in the middle.

[Note: partial sums] Each rank adds up what it sees, in float64 and in its own order; ranks meet only in `compute` and
in a checkpoint, which holds the partial sums of every rank. A run resumed on as many ranks therefore goes on with
the same bits. On other numbers of ranks each takes over those of some, so that the total stays what it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fabric_core.errors import CheckpointError, ConfigurationError, did_you_mean, listing
from fabric_core.helpers.exchange import gather_numbers
from fabric_core.helpers.states import check_state

if TYPE_CHECKING:
    from torch import Tensor

    from fabric_core.fabric import Fabric

__all__ = ["Metrics"]

MOST_PENDING = 64
"""How many updates are held as tensors before they are added up: reading one waits for the device."""

Partial = tuple[float, ...]


@dataclass(frozen=True)
class _Kind:
    """How one kind of metric is collected.

    Attributes:
        nothing: The partial result of no values.
        of: That of some values and their weights, float64 of the same shape (N,), on the CPU; no weight is 0.
        both: That of two together.
        result: The number that it comes to; NaN when there was nothing.
    """

    nothing: Partial
    of: Callable[[Tensor, Tensor], Partial]
    both: Callable[[Partial, Partial], Partial]
    result: Callable[[Partial], float]


def _added(one: Partial, other: Partial) -> Partial:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _extreme(choose: Callable[[float, float], float]) -> Callable[[Partial, Partial], Partial]:
    def both(one: Partial, other: Partial) -> Partial:
        if not (one[1] and other[1]):
            return one if one[1] else other
        is_nan = math.isnan(one[0]) or math.isnan(other[0])
        return math.nan if is_nan else choose(one[0], other[0]), one[1] + other[1]

    return both


_KINDS = {
    "mean": _Kind(
        nothing=(0.0, 0.0),
        of=lambda values, weights: ((values * weights).sum().item(), weights.sum().item()),
        both=_added,
        result=lambda partial: partial[0] / partial[1] if partial[1] else math.nan,
    ),
    "sum": _Kind(
        nothing=(0.0,),
        of=lambda values, _: (values.sum().item(),),
        both=_added,
        result=lambda partial: partial[0],
    ),
    "min": _Kind(
        nothing=(0.0, 0.0),
        of=lambda values, _: (values.min().item(), float(len(values))),
        both=_extreme(min),
        result=lambda partial: partial[0] if partial[1] else math.nan,
    ),
    "max": _Kind(
        nothing=(0.0, 0.0),
        of=lambda values, _: (values.max().item(), float(len(values))),
        both=_extreme(max),
        result=lambda partial: partial[0] if partial[1] else math.nan,
    ),
}


class Metrics:
    """Means, sums and extremes over all samples of all ranks. Put it into the state, to survive a restart.

    A mean is Σ w·v / Σ w over every sample of every rank, and not a mean of means: batches may be of different sizes,
    and padded samples have weight 0.

    Example:
        >>> metrics = Metrics(fabric, {"loss": "mean", "tokens": "sum"})
        >>> for inputs, targets in loader:
        ...     loss = loss_function(model(inputs), targets)
        ...     metrics.update({"loss": loss, "tokens": targets.numel()}, weight=len(targets))
        >>> fabric.log_dict(metrics.compute(), step)
        >>> metrics.reset()

    Args:
        fabric: Over whose ranks.
        kinds: For each metric ``"mean"``, ``"sum"``, ``"min"`` or ``"max"``.

    Raises:
        ConfigurationError: There is no such kind.
    """

    def __init__(self, fabric: Fabric, kinds: Mapping[str, str]) -> None:
        for name, kind in kinds.items():
            if kind not in _KINDS:
                raise ConfigurationError(
                    f"The metric {name!r} is to be a {kind!r}.{did_you_mean(str(kind), _KINDS)} There are: "
                    f"{listing(_KINDS)}."
                )
        self._fabric = fabric
        self._kinds = dict(kinds)
        self._partials: dict[str, Partial] = {}
        self._pending: list[tuple[str, Any, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Begin anew, for another epoch."""
        self._pending.clear()
        self._partials = {name: _KINDS[kind].nothing for name, kind in self._kinds.items()}

    def update(self, values: Mapping[str, Any], weight: Any = None) -> None:
        """Add values of this rank. Nothing is sent, and the device is not waited for.

        Args:
            values: Numbers or tensors of any shape by name. Of a tensor with several elements, each is a sample.
            weight: How many samples each value stands for: a number, or a tensor that can be broadcast to the shape
                of the values. A mean is weighted with it; what has weight 0 is left out of everything, so that a mask
                serves as well. Without one, each element of a tensor counts once.

        Raises:
            ConfigurationError: There is no such metric; a value is no number; the weights do not fit the values; or a
                single number is to go into a mean, and nobody says of how many samples it is the mean. Nothing was
                added then.
        """
        values = {name: _held(name, value) for name, value in values.items()}
        weights = None if weight is None else _held("weight", weight)
        for name, value in values.items():
            if name not in self._kinds:
                raise ConfigurationError(
                    f"There is no metric {name!r}.{did_you_mean(name, self._kinds)} There are: {listing(self._kinds)}."
                )
            if weights is None and self._kinds[name] == "mean" and not getattr(value, "ndim", 0):
                raise ConfigurationError(
                    f"The metric {name!r} is a mean, and {value!r} is one number: it has to be said of how many "
                    "samples. Pass weight=len(batch), or weight=1, or the values of all samples as a tensor."
                )
            if not _fits(weights, value):
                shape, of_weights = (tuple(getattr(each, "shape", ())) for each in (value, weights))
                raise ConfigurationError(
                    f"The values of the metric {name!r} have the shape {shape}, and their weights {of_weights}, which "
                    "cannot be broadcast to it. Pass one weight for each value, or one number for all."
                )
        each = 1.0 if weights is None else weights
        self._pending += [(name, value, each) for name, value in values.items()]
        if len(self._pending) >= MOST_PENDING:
            self._add_pending()

    def compute(self) -> dict[str, float]:
        """The metrics over all ranks. Called on every rank; equal on every rank to the last bit.

        Returns:
            A number for each metric; NaN for a mean or an extreme of nothing.
        """
        results = {}
        for name, partials in self._of_all_ranks().items():
            kind = _KINDS[self._kinds[name]]
            results[name] = kind.result(self._merged(name, partials))
        return results

    def state_dict(self) -> dict[str, Any]:
        """The partial results of every rank, float64 of shape (ranks, 1 or 2) by name. Called on every rank."""
        partials = self._of_all_ranks()
        return {
            "kinds": dict(self._kinds),
            "partials": {
                name: torch.tensor(rows, dtype=torch.float64, device="cpu") for name, rows in partials.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, on as many ranks or on others. Called on every rank.

        Raises:
            CheckpointError: It is the state of other metrics, or of something else.
        """
        check_state("Metrics", state, ("kinds", "partials"))
        if dict(state["kinds"]) != self._kinds:
            raise CheckpointError(
                f"The checkpoint holds the metrics {dict(state['kinds'])}, and these are {self._kinds}. Make them the "
                "same, or leave them out of the state that is loaded."
            )
        self._pending.clear()
        fabric = self._fabric
        for name, rows in state["partials"].items():
            mine = rows[fabric.global_rank :: fabric.world_size].tolist()
            self._partials[name] = self._merged(name, [tuple(row) for row in mine])

    def _merged(self, name: str, partials: list[Partial]) -> Partial:
        """Some partial results together: of one alone, exactly that."""
        kind = _KINDS[self._kinds[name]]
        if not partials:
            return kind.nothing
        merged, *others = partials
        for other in others:
            merged = kind.both(merged, other)
        return merged

    def _of_all_ranks(self) -> dict[str, list[Partial]]:
        self._add_pending()
        flat = [number for partial in self._partials.values() for number in partial]
        rows = [iter(row) for row in gather_numbers(self._fabric, flat)] if flat else []
        return {
            name: [tuple(next(row) for _ in partial) for row in rows]
            for name, partial in self._partials.items()
        }

    def _add_pending(self) -> None:
        """Add up what was held, in the order in which it came, whenever that happens: the bits are the same."""
        for name, value, weight in self._pending:
            values = _on_cpu(value)
            weights = _on_cpu(weight).expand_as(values)
            counts = weights != 0
            if counts.any():
                kind = _KINDS[self._kinds[name]]
                partial = kind.of(values[counts], weights[counts])
                self._partials[name] = kind.both(self._partials[name], partial)
        self._pending.clear()


def _held(name: str, value: Any) -> Any:
    """A value as it is now, whatever happens to the tensor, the array or the list: a number, or a tensor."""
    if isinstance(value, int | float):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    try:
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"The value of {name!r} is neither a number nor a tensor, an array or a list of numbers: {error}."
        ) from error


def _fits(weight: Any, value: Any) -> bool:
    """Whether a weight can be broadcast to the shape of a value."""
    shapes = [tuple(getattr(each, "shape", ())) for each in (weight, value)]
    return not shapes[0] or (
        len(shapes[0]) <= len(shapes[1])
        and all(one in (1, other) for one, other in zip(*map(reversed, shapes), strict=False))
    )


def _on_cpu(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")
