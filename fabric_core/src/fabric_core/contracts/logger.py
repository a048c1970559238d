"""The logger: where metrics go."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from fabric_core.contracts.part import Part
from fabric_core.specs import LoggerSpec

__all__ = ["Logger"]


class Logger(Part):
    """A sink for metrics. Every method is called on global rank 0 only."""

    spec_type = LoggerSpec

    @property
    def name(self) -> str:
        """What the run is called in the sink."""
        return type(self).__name__

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics. Called by ``Fabric.log`` and ``Fabric.log_dict``.

        Args:
            metrics: Plain Python numbers by name.
            step: The training step that they belong to; ``None`` when the user gave none.
        """

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Record the settings of the run. Called by users, through ``Fabric.logger``."""

    def save(self) -> None:
        """Write what is held back. Called by ``Fabric.close``."""

    def state_dict(self) -> dict[str, Any]:
        """Where the run is, so that another process goes on there. Called by ``Fabric.save`` for a logger in the state.

        What is held back is on disk, or in what is returned, when this returns: the run may be killed right after it.
        By default everything is written, and nothing is returned: a resumed run logs again what a run that was killed
        had logged after its last checkpoint.

        Returns:
            Plain values: which run it is, and what it has recorded so far.
        """
        self.save()
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the run that `state_dict` was asked for. Called by ``Fabric.load`` for a logger in the state.

        What was recorded after that is dropped, and so is what this logger has recorded before it is called: the
        resumed run logs it again.

        Args:
            state: What `state_dict` returned, of this class.
        """

    def finalize(self, status: str) -> None:
        """End the run. Called once, by ``Fabric.close``.

        Args:
            status: ``"success"`` or ``"failed"``.
        """
