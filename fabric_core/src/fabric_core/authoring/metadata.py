"""What a distribution states about itself, held against what its parts require."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from fabric_core.authoring.findings import Finding
from fabric_core.authoring.fresh import Offered
from fabric_core.authoring.subject import Stated, Subject
from fabric_core.registry import OWN_DISTRIBUTION
from fabric_core.registry.installed import canonical

UPPER = ("<", "<=", "==", "===", "~=")


def check_core(subject: Subject) -> Iterator[Finding]:
    """The dependency on the core: there, and without an upper bound."""
    if canonical(subject.name) == OWN_DISTRIBUTION:
        return
    if subject.dependencies is None:
        message = (
            "Its dependencies are dynamic, so that they are not checked before it is built and installed."
        )
        yield Finding(subject.metadata, subject.line("dynamic"), "core", message, "advice")
        return
    stated = [
        one for one in subject.dependencies if canonical(one.name) == OWN_DISTRIBUTION and not one.extra
    ]
    if not stated:
        message = f"It does not state that it needs {OWN_DISTRIBUTION}. Add it to the dependencies."
        yield Finding(
            subject.metadata, subject.line("dependencies") or subject.line("project"), "core", message
        )
    for one in stated:
        requirement = parsed(one.text)
        bounds = (
            [str(part) for part in requirement.specifier if part.operator in UPPER] if requirement else []
        )
        if bounds:
            message = (
                f"{one.text!r} has an upper bound ({', '.join(bounds)}). Leave it out: parts state the version of "
                "their contract, and the core refuses what it does not speak."
            )
            yield Finding(subject.metadata, one.line, "core", message)


def check_dependencies(subject: Subject) -> Iterator[Finding]:
    """Whether the dependencies can be read."""
    for one in subject.dependencies or ():
        if parsed(one.text) is None:
            message = f"{one.text!r} is no requirement, such as 'package>=1.0'."
            yield Finding(subject.metadata, one.line, "requires", message)


def check_requires(subject: Subject, offered: Iterable[Offered]) -> Iterator[Finding]:
    """What parts require, against what the distribution brings, itself or by an extra."""
    for part in offered:
        for text in part.spec.get("requires", ()):
            requirement = parsed(text)
            if requirement is None:
                yield part.finding("requires", f"{part.title} requires {text!r}, which is no requirement.")
            elif subject.dependencies is not None:
                yield from _brought(part, text, requirement, subject)


def _brought(part: Offered, text: str, requirement: Requirement, subject: Subject) -> Iterator[Finding]:
    bringing = [
        one for one in subject.dependencies or () if canonical(one.name) == canonical(requirement.name)
    ]
    if not bringing:
        message = (
            f"{part.title} requires {text!r}, which {subject.metadata.name} states neither among the dependencies nor "
            "in an extra. Add it there, so that pip can bring it."
        )
        yield part.finding("requires", message)
    for one in bringing:
        version = _refused(one, requirement.specifier)
        if version is not None:
            message = (
                f"{one.text!r} lets pip install {version}, which the {part.spec['kind']} {part.spec['name']!r} "
                f"refuses: it requires {text!r}. Let both state the same."
            )
            yield Finding(subject.metadata, one.line, "requires", message)


def _refused(stated: Stated, wanted: SpecifierSet) -> str | None:
    """A version that pip may install and the part refuses; ``None`` when none is in sight."""
    requirement = parsed(stated.text)
    if requirement is None or not wanted:
        return None
    allowed = requirement.specifier
    bounds = [part.version for part in (*allowed, *wanted)]
    around = ["0", *bounds, *(f"{bound}.0.0.1" for bound in bounds), "999999"]
    for version in sorted(version for version in map(_version, around) if version is not None):
        if allowed.contains(version, prereleases=True) and not wanted.contains(version, prereleases=True):
            return {"0": "any old version", "999999": "any new version"}.get(str(version), str(version))
    return None


def _version(text: str) -> Version | None:
    try:
        return Version(text.removesuffix(".*"))
    except InvalidVersion:
        return None


def parsed(text: str) -> Requirement | None:
    """A requirement; ``None`` when it cannot be read."""
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None
