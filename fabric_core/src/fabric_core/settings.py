"""Options of parts from a file: ``fabric.toml``, or ``[tool.fabric]`` in ``pyproject.toml``.

The folders from the current one upwards are looked at, and the first that has either decides, ``fabric.toml`` before
``pyproject.toml``. Where there is no file, this costs a few stat calls; a file is parsed when it is first seen, and
when it has changed.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fabric_core.errors import ConfigurationError, did_you_mean
from fabric_core.plan import OptionTable
from fabric_core.specs import KINDS

FILES: Mapping[str, tuple[str, ...]] = {"fabric.toml": (), "pyproject.toml": ("tool", "fabric")}
"""The files in the order in which a folder is searched, and the table of each that is ours."""

_NAMES_US = re.compile(rb"""(?m)(?:^|[.{,\[])\s*["']?fabric["']?\s*(?:[.\]=]|$)""")
"""What a file contains when it has a table ``tool.fabric``, however that is written. Most projects' files do not."""


def find_tables(folder: str | None = None) -> tuple[OptionTable, ...]:
    """The tables of the nearest file.

    Args:
        folder: Where the search begins (default: the current folder).

    Raises:
        ConfigurationError: The file cannot be read, or holds what is no table of options.
    """
    for place in _upwards(folder):
        for name in FILES:
            path = os.path.join(place, name)
            stamp = _stamp(path)
            found = None if stamp is None else _tables(path, stamp)
            if found is not None:
                return found
    return ()


def _upwards(folder: str | None) -> Iterator[str]:
    try:
        place = os.path.abspath(folder or os.getcwd())
    except OSError:  # the current folder was deleted
        return
    yield place
    while (parent := os.path.dirname(place)) != place:
        place = parent
        yield place


def _stamp(path: str) -> tuple[int, int] | None:
    """What changes when a file does; ``None`` when there is no such file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size) if stat.S_ISREG(found.st_mode) else None


@lru_cache(maxsize=64)
def _tables(path: str, stamp: tuple[int, int]) -> tuple[OptionTable, ...] | None:  # noqa: ARG001 (a key of the cache)
    """The tables of a file; ``None`` when it is a project's that does not speak of us."""
    inside = FILES[os.path.basename(path)]
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}.") from error
    if inside and not _NAMES_US.search(raw):
        return None
    found: Any = _parsed(path, raw)
    for name in inside:
        found = found.get(name) if isinstance(found, dict) else None
    if found is None:
        return None
    return tuple(_read(found, path, ".".join(inside)))


def _parsed(path: str, raw: bytes) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return dict(tomllib.loads(raw.decode()))
    except ValueError as error:  # also what is no UTF-8
        raise ConfigurationError(f"{path} is no valid TOML: {error}.") from error


def _read(found: Any, path: str, prefix: str) -> Iterator[OptionTable]:
    before, kinds = f"{prefix}." if prefix else "", list(map(hyphenated, KINDS))
    for written, parts in _entries(found, path, prefix):
        kind = kind_as_written(written)
        if kind not in KINDS:
            raise ConfigurationError(
                f"{path} has {before}{written}, but there is no kind {written!r}."
                f"{did_you_mean(hyphenated(kind), kinds)} Kinds: {', '.join(kinds)}."
            )
        for name, values in _entries(parts, path, f"{before}{written}"):
            title = f"{before}{written}.{name}"
            options = {option.replace("-", "_"): value for option, value in _entries(values, path, title)}
            yield OptionTable(kind, name.strip().lower(), options, f"[{title}] in {path}")


def _entries(found: Any, path: str, where: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(found, dict):
        raise ConfigurationError(
            f"{path} has {where} = {found!r}. Options stand in a table of their part, such as [strategy.NAME]."
        )
    yield from found.items()


def kind_as_written(text: str) -> str:
    """A kind as in ``fabric_core.specs.KINDS``, from ``checkpoint-io`` or ``checkpoint_io``."""
    return text.strip().lower().replace("-", " ").replace("_", " ")


def flag(kind: str, name: str) -> str:
    """An option as it is written on the command line: ``--checkpoint-io.name``."""
    return f"--{hyphenated(kind)}.{name}"


def hyphenated(kind: str) -> str:
    """A kind as it is written in files and on the command line: ``checkpoint-io``."""
    return kind.replace(" ", "-")
