"""The manager of a folder of checkpoints. Rank 0 looks and decides, and tells the others."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from fabric_core.checkpoints.choosing import Best, checked_keep, expendable
from fabric_core.checkpoints.directory import Directory
from fabric_core.checkpoints.folder import Checkpoint, Folder
from fabric_core.checkpoints.schedule import Schedule
from fabric_core.contracts.strategy import Strategy
from fabric_core.data.collections import to_scalars
from fabric_core.errors import (
    CheckpointError,
    CheckpointKeyError,
    ConfigurationError,
    UnsafeCheckpointError,
    WrongTypeError,
    listing,
)

T = TypeVar("T")


class Saving(Protocol):
    """What a manager needs of a ``Fabric``."""

    @property
    def is_global_zero(self) -> bool:
        """Whether this is global rank 0."""

    @property
    def strategy(self) -> Strategy:
        """By whose store the ranks agree."""

    def save(self, path: Any, state: Any, filter: Any = None, *, wait: bool = True) -> None:  # noqa: A002
        """As ``Fabric.save``."""

    def wait_for_save(self) -> None:
        """As ``Fabric.wait_for_save``."""

    def load(self, path: Any, state: Any, strict: bool = True) -> dict[str, Any]:
        """As ``Fabric.load``."""

    def broadcast(self, obj: T) -> T:
        """As ``Fabric.broadcast``."""


class Checkpoints:
    """The checkpoints of one training in one folder. Every method is called on every rank.

    Iterating gives each finished `Checkpoint`, the oldest first. Finding and loading need no lock and change nothing,
    so other processes may do that while a training saves.

    Args:
        fabric: Saves and loads.
        directory: The folder; it is made when something is saved.
        keep: How many of the newest to keep, from 1 on; ``None`` keeps all.
        keep_best: The name of a metric with ``"min"`` or ``"max"``; the best checkpoint is kept besides.
        every: When `due` is true: every so many steps, or after a ``timedelta``.
        prefix: What the names of the checkpoints begin with. Managers of other prefixes may use the same folder.
        check: Reads a checkpoint, and raises when it is damaged.

    Raises:
        ConfigurationError: An argument makes no sense.
    """

    def __init__(
        self,
        fabric: Saving,
        directory: Directory,
        *,
        keep: int | None,
        keep_best: tuple[str, str] | None,
        every: int | timedelta | None,
        prefix: str,
        check: Callable[[Any], object],
    ) -> None:
        self._fabric = fabric
        self._folder = Folder(directory, prefix)
        self._keep = checked_keep(keep)
        self._best = Best.asked(keep_best)
        self._schedule = Schedule(every, fabric.strategy.agreement, fabric.broadcast)
        self._check = check
        self._mine: list[str] = []

    # -- saving ---------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether it is time to save: a multiple of ``every`` lies between the last save and ``step``.

        With a ``timedelta``, the clock of rank 0 decides, which costs one broadcast; the first time since a save, the
        ranks wait for each other as in `save`.

        Args:
            step: The present step, the same on every rank.

        Raises:
            ConfigurationError: The manager was made without ``every``.
            SetupError: With a ``timedelta``, some rank did not come within the strategy's time-out.
        """
        return self._schedule.due(step)

    def save_if_due(self, state: Mapping[str, Any], step: int, **options: Any) -> Any:
        """`save`, when it is `due`; otherwise ``None``."""
        return self.save(state, step, **options) if self.due(step) else None

    def save(
        self,
        state: Mapping[str, Any],
        step: int,
        metrics: Mapping[str, Any] | None = None,
        filter: Any = None,  # noqa: A002
        wait: bool = True,
    ) -> Any:
        """Save a state as the checkpoint of a step, then delete what is not to be kept any more.

        An existing checkpoint is never written over: a second one of the same step gets a name of its own, and counts
        from then on. A crash at any moment loses at most the checkpoint that was being written.

        Args:
            state, filter, wait: As for ``Fabric.save``. What is written in the background is found once it is on disk,
                and old ones are deleted for it by the next save.
            step: The present step, from 0 on.
            metrics: Numbers by name, also tensors of one element; those of rank 0 count.

        Returns:
            Where it is: a ``Path``, or an address on a store.

        Raises:
            CheckpointError: It cannot be written, or another training saves in the same folder, or the save before,
                with ``wait=False``, has failed; on every rank. The earlier checkpoints are intact.
        """
        step = _checked_step(step)
        self._fabric.wait_for_save()  # from here on, it is among those that are there
        path = self._on_rank_zero("save", lambda: self._prepare(step, metrics or {}))
        self._fabric.save(path, state, filter, wait=wait)
        self._schedule.saved(step)
        self._on_rank_zero("save", lambda: self._rotate(path))
        return path

    def _prepare(self, step: int, metrics: Mapping[str, Any]) -> Any:
        numbers = _numbers(metrics)
        if self._best is not None and numbers and self._best.metric not in numbers:
            warnings.warn(
                f"keep_best names {self._best.metric!r}, and the metrics of step {step} have only "
                f"{listing(map(repr, numbers))}; this checkpoint can never be the best.",
                UserWarning,
                stacklevel=2,
            )
        self._folder.open_for_writing()
        return self._folder.reserve(step, numbers)

    def _rotate(self, saved: Any) -> None:
        """Delete what is not to be kept; in any case not the last one of this training's that is on disk.

        It need be neither the newest in the folder nor the one that was just saved, when that is still being written.
        """
        if self._keep is None:
            return
        found = self._folder.checkpoints()
        there, name = {each.name for each in found}, os.path.basename(saved)
        self._mine.append(name)
        last = next((mine for mine in reversed(self._mine) if mine in there), name)
        self._mine = list(dict.fromkeys((last, name)))
        protected = self._folder.protected() | set(self._mine)
        for checkpoint in expendable(found, self._keep, self._best, protected):
            self._folder.delete(checkpoint)

    # -- finding --------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self._on_rank_zero("__iter__", self._folder.checkpoints))

    def latest(self, verify: bool = False) -> Any:
        """Where the finished checkpoint of the highest step is; ``None`` when there is none.

        Args:
            verify: Read it first, and skip those that are damaged, with a warning.
        """
        return _path_of(self._last("latest", lambda found: found, verify))

    def best(self, verify: bool = False) -> Any:
        """Where the best finished checkpoint is, of equal ones the newest; ``None`` when none has a number for it.

        Args:
            verify: As for `latest`.

        Raises:
            ConfigurationError: The manager was made without ``keep_best``.
        """
        if self._best is None:
            raise ConfigurationError(
                "Which checkpoint is the best was never said: fabric.checkpoints(…, keep_best=('val_loss', 'min'))."
            )
        return _path_of(self._last("best", self._best.of, verify))

    def resume(
        self, state: MutableMapping[str, Any], strict: bool = True, fallback: bool = False
    ) -> dict[str, Any] | None:
        """Restore a state from `latest`, in place.

        Args:
            state, strict: As for ``Fabric.load``.
            fallback: Verify the checkpoint first, and take the newest one that is not damaged, with a warning.

        Returns:
            What of the checkpoint the state did not ask for; ``None`` when there is no checkpoint, and the state is as
            it was.

        Raises:
            CheckpointError: As ``Fabric.load``.
        """
        newest = self._last("resume", lambda found: found, verify=fallback)
        if newest is None:
            return None
        others = [each.name for each in self if each != newest]
        try:
            rest = self._fabric.load(newest.path, state, strict)
        except (CheckpointKeyError, UnsafeCheckpointError):
            raise
        except CheckpointError as error:
            if not others or fallback:
                raise
            raise CheckpointError(
                f"{error} There are others: {listing(others)}. To go on from the newest one that is not damaged, call "
                "resume(state, fallback=True)."
            ) from error
        self._schedule.saved(newest.step)
        self._mine = [newest.name]
        return rest

    def _last(
        self, verb: str, order: Callable[[list[Checkpoint]], list[Checkpoint]], verify: bool
    ) -> Checkpoint | None:
        """The last one in some order, or the last one that is not damaged."""

        def look() -> Checkpoint | None:
            for candidate in reversed(order(self._folder.checkpoints())):
                if not verify or self._folder.sound(candidate, self._check):
                    return candidate
                if not self._folder.has(candidate):  # another process has made a newer one meanwhile
                    return look()
            return None

        return self._on_rank_zero(verb, look)

    def _on_rank_zero(self, verb: str, action: Callable[[], T]) -> T:
        """What an action of a verb gives on rank 0, on every rank; when it fails there, all of them fail.

        Raises:
            CheckpointError: It failed because of the disk, or of what is there.
        """
        agreement = self._fabric.strategy.agreement
        agreement.meet(f"checkpoints.{verb}")
        result: Any = None
        failure: Exception | None = None
        if self._fabric.is_global_zero:
            try:
                result = action()
            except Exception as error:  # the other ranks wait, and have to be told
                failure = error
        # Reading a large checkpoint may take longer than a collective may: wait for rank 0 before there is one.
        agreement.first_failure(None, [0])
        outcome = (result, failure and f"{type(failure).__name__}: {failure}")
        result, reason = self._fabric.broadcast(outcome)
        if isinstance(failure, OSError):
            raise CheckpointError(
                f"The folder of checkpoints {str(self._folder)!r} cannot be used: {failure}."
            ) from failure
        if failure is not None:
            raise failure
        if reason is not None:
            raise CheckpointError(f"Rank 0 failed in the folder of checkpoints. {reason}")
        return result  # type: ignore[no-any-return]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in to_scalars(metrics).items()}
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).rstrip(".")
        raise CheckpointError(f"The metrics of a checkpoint are numbers, by name: {reason}.") from error


def _checked_step(step: Any) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        raise WrongTypeError(f"The step of a checkpoint is a whole number, not {step!r}.") from None
    if number < 0:
        raise ConfigurationError(f"The step of a checkpoint is {step}, but has to be 0 or more.")
    return number


def _path_of(checkpoint: Checkpoint | None) -> Any:
    return None if checkpoint is None else checkpoint.path
