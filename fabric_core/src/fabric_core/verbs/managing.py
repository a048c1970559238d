"""Managing many checkpoints."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fabric_core.verbs.state import State
from fabric_core.verbs.talking import Talking

if TYPE_CHECKING:
    from fabric_core.checkpoints import Checkpoints


class Managing(State, Talking):
    """Folders of checkpoints."""

    def checkpoints(
        self,
        path: Any,
        *,
        keep: int | None = None,
        keep_best: tuple[str, str] | None = None,
        every: int | timedelta | None = None,
        prefix: str = "step",
    ) -> Checkpoints:
        """A manager of a folder of checkpoints: it names them, finds the latest and the best, deletes old ones.

        Called on every rank. See `fabric_core.checkpoints.Checkpoints`.

        Args:
            path: The folder, or the address of one on a store; it is made when something is saved.
            keep: How many of the newest to keep, from 1 on; ``None`` keeps all.
            keep_best: The name of a metric with ``"min"`` or ``"max"``; the best checkpoint is kept besides.
            every: How often ``due`` says that it is time to save: a number of steps, or a ``timedelta``.
            prefix: What the names of the checkpoints begin with. Managers of other prefixes may use the same folder.

        Raises:
            ConfigurationError: An argument makes no sense.

        Example:
            >>> ckpts = fabric.checkpoints("runs/1", keep=3, keep_best=("val_loss", "min"), every=1000)
            >>> ckpts.resume(state)
            >>> while state["step"] < steps:
            ...     ...
            ...     state["step"] += 1
            ...     if ckpts.due(state["step"]):
            ...         ckpts.save(state, state["step"], metrics={"val_loss": validate()})
        """
        from fabric_core.checkpoints import Checkpoints, directory_at
        from fabric_core.places import place_of

        self._require_launched("checkpoints")
        return Checkpoints(
            self,
            directory_at(place_of(path).absolute()),  # the working directory may change meanwhile
            keep=keep,
            keep_best=keep_best,
            every=every,
            prefix=prefix,
            check=self._verify,
        )

    def _verify(self, path: Any) -> None:
        """Read a checkpoint on this rank alone, and keep nothing."""
        from fabric_core.places import ALONE, place_of
        from fabric_core.sharded.reading import verify

        with place_of(path).opened(ALONE) as local:
            verify(local, self._parts.checkpoint_io.load)
