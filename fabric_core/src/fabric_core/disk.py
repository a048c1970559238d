"""What it takes for an entry of a folder to survive that the machine fails: the folder is flushed, too."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["flush", "make_folders"]


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    if path.is_dir() and os.name == "nt":  # there a folder cannot be opened, and a rename needs no flush
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path) -> None:
    """Create a folder and what is missing above it, and see to it that the new entries are on disk."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for parent in missing:
        flush(parent.parent)
