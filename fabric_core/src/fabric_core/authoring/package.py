"""What makes a package pleasant to depend on: types, a readme, a licence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fabric_core.authoring.findings import Finding
from fabric_core.authoring.subject import Subject


def check_package(subject: Subject) -> Iterator[Finding]:
    """Advice on what is missing; an error where a file is named that is not there, since no wheel can be built then."""
    yield from _typed(subject)
    if subject.project:
        yield from _readme(subject)
        yield from _licence(subject)


def _typed(subject: Subject) -> Iterator[Finding]:
    for package in {entry.package: None for entry in subject.entries}:
        if package is not None and not (package / "py.typed").is_file():
            message = "A file py.typed is missing beside it, so that type checkers ignore its annotations."
            yield Finding(package / "__init__.py", 0, "package", message, "advice")


def _readme(subject: Subject) -> Iterator[Finding]:
    stated: Any = subject.project.get("readme")
    if stated is None and "readme" not in subject.project.get("dynamic", ()):
        message = "It names no readme, which is the page of the project on the package index."
        yield Finding(subject.metadata, subject.line("project"), "package", message, "advice")
    yield from _file(subject, "readme", stated.get("file") if isinstance(stated, dict) else stated)


def _licence(subject: Subject) -> Iterator[Finding]:
    stated: Any = subject.project.get("license")
    patterns: Any = subject.project.get("license-files", ())
    if not stated and not patterns and "license" not in subject.project.get("dynamic", ()):
        message = "It names no licence, so that nobody may use it."
        yield Finding(subject.metadata, subject.line("project"), "package", message, "advice")
    yield from _file(subject, "license", stated.get("file") if isinstance(stated, dict) else None)
    for pattern in patterns if isinstance(patterns, list) else ():
        if not any(subject.metadata.parent.glob(pattern)):
            yield _absent(subject, "license-files", pattern)


def _file(subject: Subject, key: str, name: str | None) -> Iterator[Finding]:
    if name is not None and not Path(subject.metadata.parent, name).is_file():
        yield _absent(subject, key, name)


def _absent(subject: Subject, key: str, name: str) -> Finding:
    return Finding(
        subject.metadata, subject.line(key), "package", f"{key} names {name!r}, which is not there."
    )
