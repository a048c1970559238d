"""Many checkpoints of one training in one folder: naming, finding, choosing and rotating them."""

from __future__ import annotations

from pathlib import Path

from fabric_core.checkpoints.directory import Directory
from fabric_core.checkpoints.folder import Checkpoint
from fabric_core.checkpoints.manager import Checkpoints
from fabric_core.checkpoints.on_disk import DiskDirectory
from fabric_core.checkpoints.on_store import StoreDirectory
from fabric_core.places import Place, RemotePlace

__all__ = ["Checkpoint", "Checkpoints"]


def directory_at(place: Place) -> Directory:
    """The folder of checkpoints at a place."""
    if isinstance(place, RemotePlace):
        return StoreDirectory(place.url, str(place))
    return DiskDirectory(Path(str(place)))
