"""Saving and loading."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from fabric_core.errors import WrongTypeError
from fabric_core.verbs.life import Life

if TYPE_CHECKING:
    from fabric_core.places import Place


class State(Life):
    """Checkpoints."""

    def save(
        self,
        path: Any = None,
        state: Any = None,
        filter: Mapping[str, Callable[[str, Any], bool]] | None = None,  # noqa: A002
        *,
        wait: bool = True,
    ) -> None:
        """Write a checkpoint. Called on every rank; returns when it is on disk, or with ``wait=False`` before.

        A crash at any moment leaves the old file or the new one. The state of the precision (a loss scale) is saved
        along. ``path`` and ``state`` may be given in either order.

        With ``wait=False`` the state is copied, and a thread writes the copy while the training goes on: what changes
        afterwards does not get into the file. The next `save`, `load`, `load_raw`, `wait_for_save` and `close` wait for
        it, and so does the end of the program.

        With loaders in its state, a checkpoint is a point to go on from: the random numbers of every rank are saved
        along, and `load` restores them. Save it at the end of the loop's body, since what follows there is not done
        again; collectives are used.

        Args:
            path: Where to: a path, or the address of a store that fsspec reaches (``s3://bucket/run.ckpt``).
            state: A dictionary of models, optimizers, loaders that were set up, objects with ``state_dict``, plain
                values, and of dictionaries of them.
            filter: For some keys, a function of a name and a value that says which entries of that state to keep.
            wait: Whether to return only when the checkpoint is on disk.

        Raises:
            CheckpointError: It cannot be written; on every rank. What was there before is intact. Or the save before,
                with ``wait=False``, has failed; this one was not begun then.
            ConfigurationError: ``path`` is the address of a store and has a sign that stands for others (``*``, ``?``).
            SetupError: Some rank did not call ``save`` within the strategy's time-out. A warning says it before.
        """
        from fabric_core import checkpoint as checkpoints
        from fabric_core.resuming import loaders_in

        self._require_launched("save")
        self._saving.wait()
        where, what = checkpoints.path_and_state(path, state)
        self.strategy.agreement.meet("save", repr(str(where)))
        if loaders_in(what):
            self._accumulation.warn_if_open()
        with self.strategy.agreement.jointly(f"collect the state for the checkpoint {str(where)!r}"):
            collected = checkpoints.collect(what, self.strategy, self._parts.precision, filter)
        staged = None if wait else self._saving.stage(partial(self.strategy.stage_checkpoint, collected))
        if staged is not None:
            there = where.absolute()  # the working directory may change meanwhile
            self._saving.start(str(where), partial(self._write, there, staged))
            return
        if not wait:
            self._warn_of_waiting()
        self._write(where, collected)

    def _write(self, where: Place, collected: Mapping[str, Any]) -> None:
        from fabric_core.places import Ranks

        where.write(Ranks.of(self.strategy), lambda path: self.strategy.save_checkpoint(path, collected))

    def wait_for_save(self) -> None:
        """Wait until the checkpoint of the last ``save(wait=False)`` is on disk. Called on every rank.

        Raises:
            CheckpointError: It was not written; on every rank. Whoever waits next is not told again.
        """
        self._saving.wait()

    def _warn_of_waiting(self) -> None:
        if not self._warned_no_background:
            self._warned_no_background = True
            warnings.warn(
                f"save(wait=False) was asked for, and the strategy {self.plan.strategy.name!r} cannot save while the "
                "training goes on. The checkpoint is written at once.",
                UserWarning,
                stacklevel=3,
            )

    def load(
        self,
        path: Any = None,
        state: Any = None,
        strict: bool = True,
        *,
        weights_only: bool = True,
    ) -> dict[str, Any]:
        """Read a checkpoint. Called on every rank.

        Args:
            path: What `save` was given. ``path`` and ``state`` may be given in either order.
            state: What to restore, in place: models, optimizers and stateful objects are loaded, plain values
                replaced. With loaders in it, their next loops go on where they stood, and so do the random numbers
                of this rank. Without it, all of the checkpoint is returned.
            strict: Raise when the checkpoint lacks a key of ``state``, or a parameter.
            weights_only: ``False`` allows the file to execute code while it is read. Only for files that you trust.

        Returns:
            What of the checkpoint ``state`` did not ask for, on the CPU. Of a checkpoint in shards, the tensors under
            a key are read when this rank uses it the first time, without the others; do that before the checkpoint is
            replaced or deleted. What nobody uses is never read.

        Raises:
            CheckpointError: There is none, it is damaged, or it does not fit: other shapes, other parameters; on every
                rank, also when one alone has found it. What was restored before that may be new then, and the rest old.
                Or the save before, with ``wait=False``, has failed; nothing was read then.
            CheckpointKeyError: It lacks a key; nothing has been restored then.
            UnsafeCheckpointError: It holds more than ``weights_only`` allows.
        """
        from fabric_core import checkpoint as checkpoints
        from fabric_core.places import place_of

        self._require_launched("load")
        self._saving.wait()
        if state is None:
            where = place_of(path)
            with self._opened("load", where, weights_only) as loaded:
                return checkpoints.left(loaded, where.absolute(), self.strategy)
        where, what = checkpoints.path_and_state(path, state)
        if not isinstance(what, MutableMapping):
            raise WrongTypeError(
                f"load restores a dictionary of things, not a {type(what).__name__}; for one bare state dict there is "
                "load_raw(path, obj)."
            )
        with self._opened("load", where, weights_only) as loaded:
            rest = checkpoints.restore(loaded, what, self.strategy, self._parts.precision, strict)
            return checkpoints.left(rest, where.absolute(), self.strategy)

    def load_raw(
        self, path: Any, obj: nn.Module | Optimizer, strict: bool = True, *, weights_only: bool = True
    ) -> None:
        """Load a bare state dict, as ``torch.save(model.state_dict())`` writes it, into a model or an optimizer.

        Called on every rank. Arguments and errors as in `load`.
        """
        from fabric_core.checkpoint import restore_raw
        from fabric_core.places import place_of

        self._require_launched("load_raw")
        self._saving.wait()
        with self._opened("load_raw", place_of(path), weights_only) as loaded:
            restore_raw(loaded, obj, self.strategy, strict)

    @contextmanager
    def _opened(self, verb: str, where: Place, weights_only: bool) -> Iterator[dict[str, Any]]:
        """What a checkpoint holds. What fails on one rank while it is restored, fails on all."""
        from fabric_core.places import Ranks

        self.strategy.agreement.meet(verb, repr(str(where)))
        with where.absolute().opened(Ranks.of(self.strategy)) as local:  # what is left may be read later
            loaded = self.strategy.load_checkpoint(local, weights_only=weights_only)
            with self.strategy.agreement.jointly(f"load the checkpoint {str(where)!r}"):
                yield loaded
