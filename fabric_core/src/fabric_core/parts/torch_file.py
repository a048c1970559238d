"""A checkpoint as one file of ``torch.save``: written whole or not at all, read without executing anything.

Every ``Fabric`` makes one of these, and few programs use it at once; so what it does is imported when it does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fabric_core.contracts.checkpoint_io import CheckpointIO
from fabric_core.hooks import TORCH_FILE

__all__ = ["TorchFile"]


class TorchFile(CheckpointIO):
    """One file that plain ``torch.load`` reads too."""

    spec = TORCH_FILE

    def save(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """Write to a temporary name beside ``path``, flush to disk, rename. See the contract."""
        from fabric_core.parts import file_format

        file_format.save(path, checkpoint, self.origin)

    def load(self, path: Path, *, weights_only: bool = True) -> dict[str, Any]:
        """Read a file onto the CPU. See the contract."""
        from fabric_core.parts import file_format

        return file_format.load(path, weights_only)

    def remove(self, path: Path) -> None:
        """Delete the file."""
        path.unlink(missing_ok=True)
