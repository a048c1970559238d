"""The checkpoint io: how one checkpoint gets onto disk and back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fabric_core.contracts.part import Part
from fabric_core.specs import CheckpointIOSpec

__all__ = ["CheckpointIO"]


class CheckpointIO(Part):
    """Writes and reads one file. A crash at any moment leaves the old file or the new one."""

    spec_type = CheckpointIOSpec

    origin: Mapping[str, Any] = MappingProxyType({})
    """What writes the checkpoints, for a format that keeps it (``fabric_core.manifest``): the names of the plan, the
    versions of its distributions, the world size. Set when a ``Fabric`` is made."""

    @abstractmethod
    def save(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """Write a checkpoint. Called on global rank 0 only; by ``save(wait=False)`` in a thread of its own.

        Args:
            path: Where to; missing folders are created, an existing file is replaced.
            checkpoint: Tensors, numbers, strings and containers of them.

        Raises:
            CheckpointError: It cannot be written. What was there before is intact.
        """

    @abstractmethod
    def load(self, path: Path, *, weights_only: bool = True) -> dict[str, Any]:
        """Read a checkpoint, onto the CPU. Called on every rank that wants it.

        Args:
            path: What `save` was given.
            weights_only: Refuse everything that could execute code.

        Raises:
            CheckpointError: There is none, or it is damaged.
            UnsafeCheckpointError: It holds more than ``weights_only`` allows.
        """

    @abstractmethod
    def remove(self, path: Path) -> None:
        """Delete a checkpoint. Called on global rank 0 only. One that is gone already is no error."""
