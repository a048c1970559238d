"""What is checked: a plugin's distribution, whether it is a folder of source or installed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Entry", "Stated", "Subject"]


@dataclass(frozen=True)
class Entry:
    """One entry point of our group.

    Attributes:
        module: The hooks module, by its dotted name.
        file: The file of that module.
    """

    module: str
    file: Path

    @property
    def package(self) -> Path | None:
        """The folder of the top package; ``None`` when the hooks module is a single file."""
        depth = self.module.count(".") + (self.file.name == "__init__.py")
        return self.file.parents[depth - 1] if depth else None


@dataclass(frozen=True)
class Stated:
    """A requirement of the distribution.

    Attributes:
        text: As it is written (PEP 508).
        line: The line on which it is.
        extra: The extra that brings it; empty when it is always installed.
    """

    text: str
    line: int
    extra: str = ""

    @property
    def name(self) -> str:
        """The package's name; empty when the requirement cannot be read."""
        found = re.match(r"\s*([A-Za-z0-9][\w.-]*)", self.text)
        return found[1] if found else ""


@dataclass(frozen=True)
class Subject:
    """A plugin's distribution.

    Attributes:
        name: Its name.
        metadata: The file that states name and dependencies: ``pyproject.toml`` or ``METADATA``.
        entries: The entry points of our group whose modules exist.
        dependencies: What it states to need; ``None`` when that is only known once it is built.
        root: The folder that has to be on the import path; ``None`` when it is installed.
        lines: Lines in ``metadata`` by what they state.
        project: The table ``[project]`` of a project's folder; empty for what is installed.
    """

    name: str
    metadata: Path
    entries: tuple[Entry, ...] = ()
    dependencies: tuple[Stated, ...] | None = ()
    root: Path | None = None
    lines: Mapping[str, int] = field(default_factory=dict)
    project: Mapping[str, Any] = field(default_factory=dict)

    def line(self, what: str) -> int:
        """The line of something in the metadata; 0 when it is not there."""
        return self.lines.get(what, 0)
