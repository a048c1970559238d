"""Which accelerator, and what the environment says: the two choices that look at the machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fabric_core.errors import BrokenPluginError, DevicesError, UnsupportedError, listing
from fabric_core.plan import AUTO, Choice, Request
from fabric_core.registry import Offer, Registry
from fabric_core.resolve.asked import asked_choice, choice_of_object, choice_of_offer, is_name, missing_requirements
from fabric_core.resolve.devices import is_cpu_request
from fabric_core.specs import AcceleratorSpec, ClusterEnvironmentSpec, Detection, Inventory, StrategySpec
from fabric_core.targets import import_target

REFERENCE_ACCELERATOR = "cpu"
REFERENCE_ENVIRONMENT = "local"
FALLBACK = "FABRIC_AUTO_FALLBACK"


@dataclass(frozen=True)
class Probed:
    """An offer of an accelerator, and what its probe answered."""

    offer: Offer
    inventory: Inventory
    broken: Exception | None = None


def probe(spec: Any) -> Inventory:
    """Ask a spec's probe what there is."""
    inventory = import_target(spec.probe, f"the probe of accelerator {spec.name!r}")()
    if not isinstance(inventory, Inventory):
        raise BrokenPluginError(f"The probe of accelerator {spec.name!r} returned {inventory!r}, not an Inventory.")
    return inventory


def choose_accelerator(request: Request, registry: Registry, strategy: StrategySpec | None) -> tuple[Choice, Inventory]:
    """The accelerator, and what its probe found.

    Args:
        request: What the user asked for.
        registry: What is installed.
        strategy: The strategy that the user named, if it was named; what it rejects is passed over.
    """
    asked = request.accelerator
    if is_cpu_request(request.devices):
        return _without_accelerator(asked, request, registry)
    if not is_name(asked):
        choice = choice_of_object(AcceleratorSpec.kind, asked)
        return choice, _required(choice)
    if asked.strip().lower() == AUTO:
        return _automatic(request, registry, strategy)
    offers = registry.named(AcceleratorSpec.kind, asked)
    if len(offers) == 1:
        choice = choice_of_offer(offers[0], f"accelerator={asked!r} was asked for")
        return choice, _required(choice)
    if any(asked.strip().lower().partition("@")[0] in offer.spec.names for offer in offers):
        registry.only(offers, asked)
    return _best_of_group(asked, offers)


def _without_accelerator(asked: Any, request: Request, registry: Registry) -> tuple[Choice, Inventory]:
    if not is_name(asked) or asked.strip().lower() not in (AUTO, REFERENCE_ACCELERATOR):
        raise DevicesError(
            f"devices={request.devices!r} means one process on the CPU, but accelerator={asked!r} was asked for. "
            "Leave out one of them; devices='auto' takes what there is."
        )
    choice = choice_of_offer(
        registry.one(AcceleratorSpec.kind, REFERENCE_ACCELERATOR),
        f"devices={request.devices!r} means one process on the CPU",
    )
    return choice, probe(choice.spec)


def _required(choice: Choice) -> Inventory:
    inventory = probe(choice.spec)
    if not inventory.available:
        raise DevicesError(
            f"accelerator={choice.name!r} was asked for, but there is no such device here"
            f"{': ' + inventory.note if inventory.note else ''}. Use accelerator='auto' to take what there is."
        )
    return inventory


def _automatic(request: Request, registry: Registry, strategy: StrategySpec | None) -> tuple[Choice, Inventory]:
    lost: list[tuple[str, str]] = []
    hidden = [str(problem) for problem in registry.problems if problem.hides_accelerators]
    for candidate in _by_priority(registry.offers(AcceleratorSpec.kind)):
        reason = _why_not(candidate, strategy)
        if candidate.broken is not None:
            hidden.append(f"{candidate.offer.full_name} (its probe failed: {candidate.broken})")
        if reason:
            lost.append((candidate.offer.spec.name, reason))
            continue
        _refuse_silent_fallback(candidate.offer.spec.name, hidden, request)
        note = candidate.inventory.note
        choice = choice_of_offer(candidate.offer, f"auto: the best that is available{f' ({note})' if note else ''}")
        return replace(choice, lost=tuple(lost)), candidate.inventory
    raise DevicesError(f"No accelerator is available. Looked at: {listing(f'{n} ({why})' for n, why in lost)}.")


def _by_priority(offers: list[Offer]) -> Iterator[Probed]:
    """Probe one after the other, best first; whoever stops reading spares the rest their probe."""
    yield from map(_probed, sorted(offers, key=_best_first))


def _probed(offer: Offer) -> Probed:
    missing = missing_requirements(offer.spec)
    if missing:
        return Probed(offer, Inventory(note=f"needs {listing(missing)}"))
    try:
        return Probed(offer, probe(offer.spec))
    except Exception as error:
        return Probed(offer, Inventory(note=f"its probe failed: {error}"), broken=error)


def _why_not(candidate: Probed, strategy: StrategySpec | None) -> str:
    if not candidate.inventory.available:
        return candidate.inventory.note or "not there"
    if strategy is not None and _names_of(candidate.offer.spec) & set(strategy.rejects):
        return f"the strategy {strategy.name!r} cannot work with it"
    return ""


def _refuse_silent_fallback(chosen: str, hidden: list[str], request: Request) -> None:
    if hidden and request.environ.get(FALLBACK) != "1":
        raise BrokenPluginError(
            f"accelerator='auto' would fall back to {chosen!r}, but an installed plugin that may offer better hardware "
            f"is broken: {listing(hidden)}. Repair or uninstall it, block it with FABRIC_PLUGINS_DENY, name the "
            f"accelerator explicitly, or allow the fallback with {FALLBACK}=1."
        )


def _best_of_group(group: str, offers: list[Offer]) -> tuple[Choice, Inventory]:
    candidates = list(_by_priority(offers))
    for candidate in candidates:
        if candidate.broken is not None:
            raise BrokenPluginError(
                f"accelerator={group!r}: the probe of {candidate.offer.full_name} failed: {candidate.broken}"
            ) from candidate.broken
    lost = [(c.offer.spec.name, c.inventory.note or "not there") for c in candidates if not c.inventory.available]
    for candidate in candidates:
        if candidate.inventory.available:
            reason = f"the best available of the group {group!r}"
            return choice_of_offer(candidate.offer, reason, tuple(lost)), candidate.inventory
    raise DevicesError(
        f"accelerator={group!r} was asked for, but no device of that group is here: "
        f"{listing(f'{name} ({why})' for name, why in lost)}. Use accelerator='auto' to take what there is."
    )


def choose_environment(asked: Any, registry: Registry, environ: Mapping[str, str]) -> tuple[Choice, Detection | None]:
    """The cluster environment, and what it tells of the job (``None`` when it detected nothing)."""
    if asked is not None:
        choice = asked_choice(ClusterEnvironmentSpec.kind, asked, registry)
        return choice, _detection(choice.spec, environ)
    offers = sorted(registry.offers(ClusterEnvironmentSpec.kind), key=_best_first)
    detected = [(offer, found) for offer in offers if (found := _tried(offer, registry, environ)) is not None]
    if not detected:
        offer = registry.one(ClusterEnvironmentSpec.kind, REFERENCE_ENVIRONMENT)
        return choice_of_offer(offer, "no cluster environment was detected"), None
    (offer, found), *others = detected
    rivals = [rival for rival, _ in others if _priority(rival) == _priority(offer)]
    if rivals:
        raise UnsupportedError(
            f"Several cluster environments are detected here, none before the other: {offer.full_name}, "
            f"{listing(o.full_name for o in rivals)}. Name one in plugins=[…]."
        )
    lost = tuple((o.spec.name, f"detected too ({f.note}), with a lower priority") for o, f in others)
    return choice_of_offer(offer, f"detected: {found.note}", lost), found


def _detection(spec: Any, environ: Mapping[str, str]) -> Detection | None:
    if spec.detect is None:
        return None
    found = import_target(spec.detect, f"the detection of cluster environment {spec.name!r}")(environ)
    return found if isinstance(found, Detection) else None


def _tried(offer: Offer, registry: Registry, environ: Mapping[str, str]) -> Detection | None:
    """A detection that fails is kept as a problem of its plugin, and does not stop the others."""
    try:
        return _detection(offer.spec, environ)
    except Exception as error:
        registry.report(offer.distribution, error, where=f"detection of {offer.spec.name!r}")
        return None


def _names_of(spec: Any) -> set[str]:
    return {*spec.names, *(group.lower() for group in spec.groups)}


def _best_first(offer: Offer) -> tuple[int, str]:
    return -_priority(offer), offer.spec.name


def _priority(offer: Offer) -> int:
    spec: Any = offer.spec
    return int(spec.priority)
