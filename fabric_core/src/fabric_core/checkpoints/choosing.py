"""Which checkpoints are kept, and which is the best. Nothing here touches the disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fabric_core.checkpoints.folder import Checkpoint
from fabric_core.errors import ConfigurationError

SIGNS = {"min": 1, "max": -1}


@dataclass(frozen=True)
class Best:
    """What makes a checkpoint the best one.

    Attributes:
        metric: The name of a metric.
        mode: Whether the best is the one with its ``"min"`` or its ``"max"``.
    """

    metric: str
    mode: str

    @classmethod
    def asked(cls, value: Any) -> Best | None:
        """From what the user wrote.

        Raises:
            ConfigurationError: It is neither ``None`` nor a name with ``"min"`` or ``"max"``.
        """
        if value is None:
            return None
        is_pair = isinstance(value, Sequence) and len(value) == 2
        if not is_pair or not all(isinstance(word, str) for word in value) or value[1] not in SIGNS:
            raise ConfigurationError(
                f"keep_best={value!r} does not say which checkpoint is the best. It takes the name of a metric with "
                "'min' or 'max': keep_best=('val_loss', 'min')."
            )
        return cls(*value)

    def of(self, checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
        """Those that have the metric, and not as NaN: the best last; of equal ones, the newer later."""
        sign = SIGNS[self.mode]
        there = [each for each in checkpoints if not math.isnan(each.metrics.get(self.metric, math.nan))]
        return sorted(there, key=lambda each: (-sign * each.metrics[self.metric], each.step, each.version))


def checked_keep(keep: Any) -> int | None:
    """How many to keep.

    Raises:
        ConfigurationError: It is neither a number above 0 nor ``None``.
    """
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ConfigurationError(
            f"keep={keep!r} is no number of checkpoints to keep. It takes 1 or more, or None for all."
        )
    return keep


def expendable(
    checkpoints: Sequence[Checkpoint], keep: int | None, best: Best | None, protected: set[str]
) -> list[Checkpoint]:
    """Those to delete, the oldest first.

    Args:
        checkpoints: All that are finished, the newest last.
        keep: Of how many steps the newest are kept; of each, the last version. ``None`` keeps everything.
        best: What makes one the best, which is kept besides.
        protected: Names that are kept in any case.
    """
    if keep is None:
        return []
    newest = {each.step: each for each in checkpoints}
    kept = {newest[step].path for step in sorted(newest)[-keep:]}
    kept.update(each.path for each in (best.of(checkpoints)[-1:] if best else ()))
    return [each for each in checkpoints if each.path not in kept and each.name not in protected]
