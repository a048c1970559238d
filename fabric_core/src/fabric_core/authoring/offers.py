"""What a plugin offers, held against the core and against what else is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fabric_core.authoring.findings import Finding
from fabric_core.authoring.fresh import Offered
from fabric_core.authoring.subject import Subject
from fabric_core.contract_versions import CURRENT, oldest, spoken
from fabric_core.errors import listing
from fabric_core.registry import Offer, Registry
from fabric_core.registry.discovery import canonical
from fabric_core.specs import PrecisionSpec


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
    others = [
        offer for offer in registry.offers() if canonical(offer.distribution) != canonical(subject.name)
    ]
    for index, part in enumerate(offered):
        twin = next((other for other in offered[:index] if _same(part, other)), None)
        if twin is not None:
            where = f"{twin.file.name}:{twin.line}"
            yield part.finding("specs", f"{part.title} has a name that another part of it has ({where}).")
        rivals = {offer.distribution for offer in others if _same(part, offered_by(offer))}
        if rivals:
            message = (
                f"{part.title} has a name that {listing(rivals)} offers too. Where both are installed, users have to "
                f"write '{part.spec['name']}@{subject.name}'. Choose another name."
            )
            yield part.finding("clash", message)


def offered_by(offer: Offer) -> Offered:
    """A part of an installed distribution in the form of comparison."""
    from pathlib import Path

    from fabric_core.authoring.hook_module import spec_data

    return Offered(spec_data(offer.spec), Path(), 0)


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
