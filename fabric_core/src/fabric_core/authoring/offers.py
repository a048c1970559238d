"""What a plugin offers, held against the core and against what else is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from fabric_core.authoring.findings import Finding
from fabric_core.authoring.fresh import Offered
from fabric_core.authoring.hook_module import spec_data
from fabric_core.authoring.subject import Subject
from fabric_core.contract_versions import CURRENT, oldest, spoken
from fabric_core.errors import listing
from fabric_core.hookspecs import OWN_COMMANDS
from fabric_core.registry import Registry
from fabric_core.registry.installed import canonical
from fabric_core.specs import CommandSpec, PrecisionSpec


def check_versions(offered: Iterable[Offered]) -> Iterator[Finding]:
    """The versions of contracts, against those that this core speaks."""
    for part in offered:
        kind, api = part.spec["kind"], part.spec.get("api")
        if api is None:
            continue
        if not oldest(kind) <= api <= CURRENT[kind]:
            message = (
                f"{part.title} states api={api}; this core speaks {spoken(kind)} of the contract of a {kind}."
            )
            yield part.finding("version", message)
        elif api < CURRENT[kind]:
            message = f"{part.title} is of version {api} of its contract, and is adapted to {CURRENT[kind]}."
            yield part.finding("version", message, "advice")


def check_clashes(subject: Subject, offered: list[Offered], registry: Registry) -> Iterator[Finding]:
    """Names that something else has, here or in another installed distribution."""
    others = [other for other in _installed(registry) if canonical(other[0]) != canonical(subject.name)]
    for index, part in enumerate(offered):
        twin = next((other for other in offered[:index] if _same(part, other)), None)
        if twin is not None:
            where = f"{twin.file.name}:{twin.line}"
            yield part.finding("specs", f"{part.title} has a name that another part of it has ({where}).")
        rivals = {distribution for distribution, other in others if _same(part, other)}
        if rivals:
            message = (
                f"{part.title} has a name that {listing(rivals)} offers too. Where both are installed, users have to "
                f"write '{part.spec['name']}@{subject.name}'. Choose another name."
            )
            yield part.finding("clash", message)
        if part.spec["kind"] == CommandSpec.kind and part.spec["name"] in OWN_COMMANDS:
            yield part.finding(
                "clash", f"{part.title} has the name of a command of the core, and is never called."
            )


def _installed(registry: Registry) -> Iterator[tuple[str, Offered]]:
    """Everything that is on offer, in the form of comparison, and the distribution of each."""
    for offer in registry.offers():
        yield offer.distribution, Offered(spec_data(offer.spec), Path(), 0)
    for spec, distribution in registry.commands:
        yield distribution, Offered(spec_data(spec), Path(), 0)


def _same(one: Offered, other: Offered) -> bool:
    """Whether two parts cannot be told apart by name, nor by scope."""
    if one.spec["kind"] != other.spec["kind"]:
        return False
    scoped = one.spec["kind"] == PrecisionSpec.kind
    same_scope = not scoped or all(
        one.spec[scope] == other.spec[scope] for scope in ("strategies", "accelerators")
    )
    return bool(_names(one) & _names(other)) and same_scope


def _names(part: Offered) -> set[str]:
    return {name.lower() for name in (part.spec["name"], *part.spec.get("aliases", ()))}
