"""Finding the installed plugins, distribution by distribution.

The standard ``entry_points()`` raises when one foreign package has a malformed file, and pluggy's own loader stops at
the first broken plugin. Here every distribution stands alone, and only the files that speak of us are parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from fabric_core.hookspecs import ENTRY_POINT_GROUP
from fabric_core.registry import installed
from fabric_core.registry.installed import Installed, canonical


@dataclass(frozen=True)
class Found:
    """One entry point of one distribution, not loaded yet.

    Attributes:
        distribution: The distribution's name, as it calls itself.
        version: Its version.
        name: The entry point's name.
        module: The hooks module, by its dotted name; empty when the entry cannot be read.
        error: Why the entry cannot be read; empty when it can.
    """

    distribution: str
    version: str
    name: str
    module: str
    error: str = ""


def find_plugins() -> list[Found]:
    """Every plugin on ``sys.path``, in the order of distribution names, whatever the order of directories.

    Of two copies of one distribution, the first on the path counts, as it does for imports.
    """
    found: dict[str, list[Found]] = {}
    for distribution in installed.distributions():
        lines = _our_lines(distribution)
        if lines:
            name, version, error = _identity(distribution)
            found.setdefault(canonical(name), [_parse(name, version, line, error) for line in lines])
    return [entry for name in sorted(found) for entry in found[name]]


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or ``None``. Looks at metadata; imports nothing."""
    found = installed.distribution(distribution)
    return None if found is None else _header("Version", _headers(found)) or None


def requirements_of(distribution: str) -> list[str]:
    """What an installed distribution states to need (PEP 508), with that of its extras. Looks at metadata only."""
    found = installed.distribution(distribution)
    headers = "" if found is None else _headers(found)
    return re.findall(r"^Requires-Dist:[ \t]*(.+?)[ \t\r]*$", headers, re.MULTILINE | re.IGNORECASE)


def _our_lines(distribution: Installed) -> list[str]:
    """The lines of our group in ``entry_points.txt``; none when there is no such group, or no readable file."""
    text = _read(distribution, "entry_points.txt")
    return list(_section(text)) if ENTRY_POINT_GROUP in text else []


def _identity(distribution: Installed) -> tuple[str, str, str]:
    """Name and version as the metadata states them, and what is wrong with that."""
    headers = _headers(distribution)
    name, version = _header("Name", headers), _header("Version", headers)
    if name and version:
        return name, version, ""
    folder = installed.folder_of(distribution)
    return (
        name or folder,
        version or "unknown",
        f"the metadata in {folder} have no {'version' if name else 'name'}",
    )


def _headers(distribution: Installed) -> str:
    """The head of the metadata, as it is written.

    ``metadata.version`` and its like answer a missing line with ``None``, a warning or an exception, depending on the
    version of Python.
    """
    return (_read(distribution, "METADATA") or _read(distribution, "PKG-INFO")).partition("\n\n")[0]


def _header(key: str, headers: str) -> str:
    found = re.search(rf"^{key}:[ \t]*(\S+)", headers, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else ""


def _read(distribution: Installed, file: str) -> str:
    try:
        return distribution.read_text(file) or ""
    except (OSError, UnicodeError):
        return ""


def _section(text: str) -> Iterator[str]:
    inside = False
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("["):
            inside = line == f"[{ENTRY_POINT_GROUP}]"
        elif inside and line and not line.startswith(("#", ";")):
            yield line


def _parse(distribution: str, version: str, line: str, error: str) -> Found:
    name, _, module = (part.strip() for part in line.partition("="))
    if not re.fullmatch(r"\w+(\.\w+)*", module):
        error = f"the entry point {line!r} does not name a module"
    return Found(distribution, version, name, "" if error else module, error)
