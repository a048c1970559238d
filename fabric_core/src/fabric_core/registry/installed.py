"""The installed distributions, as ``importlib.metadata`` finds them, without the fifty modules that it imports.

Only folders on the import path are searched here. Where anything else may hold distributions (an archive, an egg, a
finder of somebody's own), the standard library is asked.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.machinery import PathFinder
from typing import Any, Protocol


class Installed(Protocol):
    """The metadata of one distribution."""

    def read_text(self, filename: str) -> str | None:
        """The text of one of its files; ``None`` when there is no such file."""


class Folder:
    """A distribution whose metadata lie in a folder.

    Attributes:
        path: The folder, ``…/name-version.dist-info``.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def read_text(self, filename: str) -> str | None:
        """The text of one of its files; ``None`` when there is no such file."""
        try:
            with open(os.path.join(self.path, filename), encoding="utf-8") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
            return None


def distributions() -> Iterator[Installed]:
    """Everything that is installed, in the order of the import path."""
    folders = None if _has_other_finders() else _folders()
    if folders is None:
        from importlib import metadata

        yield from metadata.distributions()
        return
    yield from map(Folder, folders)


def distribution(name: str) -> Installed | None:
    """The first on the import path that has a name; ``None`` when there is none."""
    folders = None if _has_other_finders() else _folders()
    if folders is None:
        from importlib import metadata

        try:
            return metadata.distribution(name)
        except metadata.PackageNotFoundError:
            return None
    wanted = canonical(name)
    return next((Folder(path) for path in folders if _name_of(path) == wanted), None)


def canonical(name: str) -> str:
    """A distribution's name in the form in which names are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def folder_of(found: Installed) -> str:
    """The name of the folder with the metadata, for messages."""
    path = getattr(found, "path", None) or getattr(found, "_path", "unknown")
    return os.path.basename(str(path).rstrip("/\\"))


def _has_other_finders() -> bool:
    return any(hasattr(finder, "find_distributions") and finder is not PathFinder for finder in sys.meta_path)


def _folders() -> list[str] | None:
    """The folders with metadata; ``None`` when there may be distributions elsewhere."""
    found: list[str] = []
    path: list[Any] = sys.path
    for place in dict.fromkeys(path):
        if not isinstance(place, str):  # nor does Python import from there
            continue
        try:
            listed = _listed(place, os.stat(place or ".").st_mtime_ns)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        if listed is None:
            return None
        found += listed
    return found


@lru_cache(maxsize=128)
def _listed(place: str, _: int) -> list[str] | None:
    """Those in one folder, as of its last change; ``None`` when it is an egg."""
    if place.lower().endswith(".egg"):
        return None
    names = os.listdir(place or ".")
    return [os.path.join(place, name) for name in names if name.lower().endswith((".dist-info", ".egg-info"))]


@lru_cache(maxsize=4096)  # every requirement of every part is looked for among all of them
def _name_of(path: str) -> str:
    return canonical(os.path.basename(path).rpartition(".")[0].partition("-")[0])
