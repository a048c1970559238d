"""What is written beside its place, a file or a folder, before it is put there whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from pathlib import Path

__all__ = ["left_beside", "remove", "remove_abandoned", "shortened", "temporary_for", "temporary_name"]

ABANDONED = 3600.0
"""Seconds after which what nobody writes to any more is taken for what a crash has left."""

LONGEST = 128
"""Bytes. File systems take names of 255, some of 143; what is added to a name may not make it too long."""


def temporary_for(path: Path, token: str) -> Path:
    """Where something is written to before it is finished.

    Args:
        path: Its place.
        token: Some digits (hexadecimal) that nobody else has.
    """
    return path.with_name(temporary_name(path.name, token))


def temporary_name(name: str, token: str) -> str:
    """What something is called as long as it is not finished; arguments as above, with a name for a path."""
    return f".{shortened(name)}.{token}.tmp"


def shortened(name: str) -> str:
    """A name; of a very long one its beginning, and digits that tell it from others."""
    whole = os.fsencode(name)
    if len(whole) <= LONGEST:
        return name
    digits = hashlib.blake2b(whole, digest_size=8).hexdigest()
    return f"{whole[: LONGEST - len(digits) - 1].decode(errors='ignore')}~{digits}"


def left_beside(path: Path) -> list[Path]:
    """What is there that was to be put in a place, or was put aside."""
    if not path.parent.is_dir():
        return []
    # Not those of "NAME.1".
    names = re.compile(rf"\.{re.escape(shortened(path.name))}\.[0-9a-f]+\.(tmp|old)")
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
