"""Whether the packages that a part needs are installed, by what their metadata say."""

from __future__ import annotations

from fabric_core.errors import BrokenPluginError
from fabric_core.registry.discovery import installed_version, requirements_of
from fabric_core.specs import PartSpec

__all__ = ["missing_requirements", "unmet_dependencies"]


def missing_requirements(spec: PartSpec) -> list[str]:
    """The requirements of a spec that the installed packages do not meet. Looks at metadata; imports nothing."""
    return [requirement for requirement in spec.requires if not _is_met(requirement)]


def unmet_dependencies(distribution: str) -> list[str]:
    """What an installed distribution states to need, and is not here in a fitting version. Extras are left out."""
    return [requirement for requirement in requirements_of(distribution) if not _is_met(requirement)]


def _is_met(text: str) -> bool:
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.version import InvalidVersion

    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise BrokenPluginError(f"the requirement {text!r} of a plugin cannot be read: {error}") from error
    if requirement.marker is not None and not requirement.marker.evaluate():
        return True
    version = installed_version(requirement.name)
    try:
        return version is not None and requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return False
