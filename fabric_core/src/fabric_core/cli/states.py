"""Whether what is installed can be used, as plain rows: one for every part, and one for every other distribution."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fabric_core.cli import OWN
from fabric_core.contract_versions import is_spoken, spoken
from fabric_core.errors import FabricError, listing
from fabric_core.registry import Offer, Registry
from fabric_core.registry.discovery import installed_version
from fabric_core.requirements import missing_requirements
from fabric_core.specs import CommandSpec

COMMAND = CommandSpec.kind
OK = "ok"


def state_of(offer: Offer, registry: Registry) -> str:
    """Whether a part can be used: ``ok``, or what is in the way."""
    spec = offer.spec
    if not is_spoken(spec):
        return f"wrong contract version: {spec.api}, and this core speaks {spoken(spec.kind)}"
    try:
        missing = missing_requirements(spec)
    except FabricError as error:
        return f"broken: {error}"
    if missing:
        return f"needs {listing(missing)}"
    return _clash(other.distribution for other in registry.offers(spec.kind) if _rivals(offer, other))


def _clash(distributions: Iterable[str]) -> str:
    rivals = set(distributions)
    return f"clash: {listing(rivals)} offers it too" if rivals else OK


def _rivals(one: Offer, other: Offer) -> bool:
    """Whether two offers share a name, and the scope that could tell them apart."""
    scopes = [[getattr(o.spec, name, None) for name in ("strategies", "accelerators")] for o in (one, other)]
    same_scope = one.spec.kind != "precision" or scopes[0] == scopes[1]
    return one is not other and bool(set(one.spec.names) & set(other.spec.names)) and same_scope


def rows(kind: str, registry: Registry) -> list[dict[str, Any]]:
    """One row for every part of a kind, or for every command, by name."""
    if kind == COMMAND:
        return sorted(_commands(registry), key=lambda row: (row["name"], row["distribution"]))
    offers = sorted(registry.offers(kind), key=lambda offer: (offer.spec.name, offer.distribution))
    return [row(offer, registry) for offer in offers]


def row(offer: Offer, registry: Registry) -> dict[str, Any]:
    """What there is to say about every part, of whatever kind."""
    return {
        "kind": offer.spec.kind,
        "name": offer.spec.name,
        "aliases": list(offer.spec.aliases),
        "distribution": offer.distribution,
        "version": offer.version,
        "state": state_of(offer, registry),
        "description": offer.spec.description,
    }


def _commands(registry: Registry) -> Iterator[dict[str, Any]]:
    for spec, distribution in registry.commands:
        others = [
            theirs for other, theirs in registry.commands if other.name == spec.name and other is not spec
        ]
        yield {
            "kind": COMMAND,
            "name": spec.name,
            "aliases": [],
            "distribution": distribution,
            "version": installed_version(distribution) or "",
            "state": "clash: it is a command of the core" if spec.name in OWN else _clash(others),
            "description": spec.help,
        }


def broken(registry: Registry) -> list[dict[str, str]]:
    """What is wrong with distributions, so that parts of theirs are missing, all or some."""
    return [
        _missing(problem.distribution, installed_version(problem.distribution), "broken", problem.message)
        for problem in registry.problems
        if problem.fatal
    ]


def blocked(registry: Registry) -> list[dict[str, str]]:
    """The distributions that are not loaded, because the environment says so."""
    return [
        _missing(found.distribution, found.version, "blocked", "by FABRIC_PLUGINS_*")
        for found in registry.blocked
    ]


def _missing(distribution: str, version: str | None, state: str, message: str) -> dict[str, str]:
    return {"distribution": distribution, "version": version or "unknown", "state": state, "message": message}
