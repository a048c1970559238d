"""What is written beside its place, a file or a folder, before it is put there whole."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from pathlib import Path

__all__ = ["left_beside", "remove", "remove_abandoned", "temporary_for"]

ABANDONED = 3600.0
"""Seconds after which what nobody writes to any more is taken for what a crash has left."""


def temporary_for(path: Path, token: str) -> Path:
    """Where something is written to before it is finished.

    Args:
        path: Its place.
        token: Some digits (hexadecimal) that nobody else has.
    """
    return path.with_name(f".{path.name}.{token}.tmp")


def left_beside(path: Path) -> list[Path]:
    """What is there that was to be put in a place, or was put aside."""
    if not path.parent.is_dir():
        return []
    names = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]+\.(tmp|old)")  # and not those of "NAME.1"
    return [entry for entry in path.parent.iterdir() if names.fullmatch(entry.name)]


def remove(path: Path) -> None:
    """Delete a folder, a file or a link, if it is there and can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def remove_abandoned(path: Path) -> None:
    """Delete what processes that were killed while they wrote to ``path`` have left."""
    for entry in left_beside(path):
        if entry.is_dir() and not path.exists():  # it may be what is left of the checkpoint
            continue
        with contextlib.suppress(OSError):  # whoever wrote it has just finished, or is another user
            if time.time() - entry.stat().st_mtime > ABANDONED:
                remove(entry)
