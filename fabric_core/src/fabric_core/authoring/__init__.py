"""For authors of plugins: everything that is wrong with a plugin, at once, each with its file and line.

`check_project` looks at a folder of source that need not be installed, `check_installed` at what is installed. Both
import the plugin in fresh processes only, so that the process that asks stays as it was.
"""

from __future__ import annotations

from pathlib import Path

from fabric_core.authoring.findings import CHECKS, Finding
from fabric_core.authoring.fresh import Offered, read_entry
from fabric_core.authoring.installed import read_installed
from fabric_core.authoring.metadata import check_core, check_dependencies, check_requires
from fabric_core.authoring.offers import check_clashes, check_versions
from fabric_core.authoring.package import check_package
from fabric_core.authoring.pyproject import read_project
from fabric_core.authoring.source import check_source
from fabric_core.authoring.subject import Subject
from fabric_core.registry import Registry, default_registry

__all__ = ["CHECKS", "Finding", "check_installed", "check_project"]


def check_project(folder: str | Path, registry: Registry | None = None) -> list[Finding]:
    """Everything that is wrong with the plugin in a folder of source.

    Args:
        folder: Where its ``pyproject.toml`` is. The project need not be installed; what it depends on should be.
        registry: What else is installed (default: what is on the import path).

    Returns:
        The findings, in the order of files and lines; empty when there are none.

    Raises:
        ConfigurationError: The folder is no project.
    """
    subject, findings = read_project(Path(folder).resolve())
    return sorted(findings + ([] if subject is None else _check(subject, registry)))


def check_installed(distribution: str, registry: Registry | None = None) -> list[Finding]:
    """Everything that is wrong with an installed plugin. Arguments and result as for `check_project`.

    Raises:
        UnknownPluginError: No installed plugin has that name.
    """
    subject, findings = read_installed(distribution)
    return sorted(findings + _check(subject, registry))


def _check(subject: Subject, registry: Registry | None) -> list[Finding]:
    findings = [*check_core(subject), *check_dependencies(subject), *check_package(subject)]
    offered: list[Offered] = []
    for entry in subject.entries:
        specs, told = read_entry(subject, entry)
        offered += specs
        findings += [*check_source(entry), *told]
    findings += check_versions(offered)
    findings += check_requires(subject, offered)
    findings += check_clashes(subject, offered, registry or default_registry())
    return list(dict.fromkeys(findings))
