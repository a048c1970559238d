"""An installed distribution: what its metadata state."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from fabric_core.authoring.findings import Finding
from fabric_core.authoring.layout import find_installed
from fabric_core.authoring.subject import Entry, Stated, Subject
from fabric_core.errors import UnknownPluginError, did_you_mean, listing
from fabric_core.registry.discovery import find_plugins
from fabric_core.registry.installed import canonical


def read_installed(name: str) -> tuple[Subject, list[Finding]]:
    """What an installed distribution states, and what is wrong with its entry points.

    Raises:
        UnknownPluginError: No installed plugin has that name.
    """
    plugins = find_plugins()
    found = [entry for entry in plugins if canonical(entry.distribution) == canonical(name)]
    if not found:
        names = {entry.distribution for entry in plugins}
        raise UnknownPluginError(
            f"No installed plugin is a distribution named {name!r}.{did_you_mean(name, names)} Installed: "
            f"{listing(names)}."
        )
    file = _metadata_file(name)
    modules = {entry.module: find_installed(entry.module) for entry in found if entry.module}
    findings = [
        Finding(file, 0, "entry-point", f"{e.error[0].upper()}{e.error[1:]}.") for e in found if e.error
    ]
    findings += [
        Finding(file, 0, "entry-point", f"The entry point names the module {module!r}, which is not there.")
        for module, where in modules.items()
        if where is None
    ]
    subject = Subject(
        name=found[0].distribution,
        metadata=file,
        entries=tuple(Entry(module, where) for module, where in modules.items() if where is not None),
        dependencies=tuple(_stated(file)),
    )
    return subject, findings


def _metadata_file(name: str) -> Path:
    info = Path(str(getattr(metadata.distribution(name), "_path", name)))
    return next((info / name for name in ("METADATA", "PKG-INFO") if (info / name).is_file()), info)


def _stated(file: Path) -> Iterator[Stated]:
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for number, line in enumerate(text.partition("\n\n")[0].splitlines(), 1):
        key, _, requirement = line.partition(":")
        if key.lower() == "requires-dist":
            extra = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", requirement)
            yield Stated(requirement.strip(), number, extra[1] if extra else "")
