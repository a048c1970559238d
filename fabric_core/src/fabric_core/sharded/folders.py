"""The place of a folder: written beside it, and put there whole or not at all."""

from __future__ import annotations

import logging
from pathlib import Path

from fabric_core.beside import left_beside, remove
from fabric_core.disk import flush
from fabric_core.errors import CheckpointError
from fabric_core.manifest import MANIFEST

_log = logging.getLogger("fabric_core")

__all__ = ["check_replaceable", "find", "publish"]


def find(path: Path) -> Path | None:
    """The folder of the sharded checkpoint that is called ``path``; ``None`` when that is no folder.

    Where a crash came between putting the old one aside and the new one in its place, it is the new one.
    """
    if path.is_dir():
        return path
    if path.exists():
        return None
    finished = [folder for folder in left_beside(path) if (folder / MANIFEST).is_file()]
    found = max(finished, key=lambda folder: (folder / MANIFEST).stat().st_mtime_ns, default=None)
    if found is not None:
        _log.warning(
            "%s is not there: taken is %s, which a save that was killed has left whole.", path, found
        )
    return found


def check_replaceable(path: Path) -> None:
    """See to it that only a checkpoint is replaced, and never a folder in which people have other things.

    Raises:
        CheckpointError: A folder is there that is neither empty nor a checkpoint.
    """
    if path.is_dir() and not path.is_symlink() and not (path / MANIFEST).exists() and any(path.iterdir()):
        raise CheckpointError(
            f"{str(path)!r} is a folder with other things in it, and no checkpoint (it has no {MANIFEST}). It is not "
            "replaced. Name another folder, or one in it."
        )


def publish(folder: Path, path: Path) -> None:
    """Put a folder in its place, in which everything is on disk already. A checkpoint that is there is replaced.

    Raises:
        CheckpointError: Something else is there.
        OSError: It cannot be put there.
    """
    check_replaceable(path)
    flush(folder)
    aside = folder.with_suffix(".old")
    replaces = path.exists()
    if replaces:
        path.rename(aside)
    try:
        folder.rename(path)
    except OSError:
        if replaces:
            aside.rename(path)
        raise
    flush(path.parent)
    remove(aside)
