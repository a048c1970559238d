"""Which accelerator, and what the environment says: the two choices that look at the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from fabric_core.errors import BrokenPluginError, DevicesError, FabricError, listing
from fabric_core.plan import AUTO, Choice, Request
from fabric_core.registry import OWN_DISTRIBUTION, Offer, Registry
from fabric_core.requirements import missing_requirements
from fabric_core.resolve.asked import (
    asked_choice,
    check_usable,
    choice_of_object,
    choice_of_offer,
    is_name,
    overlap,
    undecided,
)
from fabric_core.resolve.devices import is_cpu_request
from fabric_core.specs import AcceleratorSpec, ClusterEnvironmentSpec, Detection, Inventory, StrategySpec
from fabric_core.targets import import_target

REFERENCE_ACCELERATOR = "cpu"
REFERENCE_ENVIRONMENT = f"local@{OWN_DISTRIBUTION}"
FALLBACK = "FABRIC_AUTO_FALLBACK"


@dataclass(frozen=True)
class Probed:
    """An offer of an accelerator, and what its probe answered."""

    offer: Offer
    inventory: Inventory
    broken: Exception | None = None


def probe(spec: Any) -> Inventory:
    """Ask a spec's probe what there is.

    Raises:
        BrokenPluginError: The probe cannot be loaded, raises, or answers with something else. The cause is chained.
    """
    return cast(Inventory, _ask(spec.probe, (), Inventory, f"The probe of accelerator {spec.name!r}"))


def detection(spec: Any, environ: Mapping[str, str]) -> Detection | None:
    """What a cluster environment sees in the environment variables; ``None`` when it is not there.

    Raises:
        BrokenPluginError: As for `probe`.
    """
    if spec.detect is None:
        return None
    what = f"The detection of cluster environment {spec.name!r}"
    found = _ask(spec.detect, (environ,), Detection | None, what)
    return cast("Detection | None", found)


def _ask(target: Any, arguments: tuple[Any, ...], answer: Any, what: str) -> Any:
    """Call a function of a plugin, and hold it to what it has promised."""
    function = import_target(target, what)
    try:
        found = function(*arguments)
    except (Exception, SystemExit) as error:
        raise BrokenPluginError(f"{what} failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, answer):
        raise BrokenPluginError(
            f"{what} returned {found!r}, which is no {getattr(answer, '__name__', answer)}."
        )
    return found


def choose_accelerator(
    request: Request, registry: Registry, strategy: StrategySpec | None
) -> tuple[Choice, Inventory]:
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
        return _best(AUTO, registry.offers(AcceleratorSpec.kind), request, registry, strategy)
    offers = registry.named(AcceleratorSpec.kind, asked)
    if not any(asked.strip().lower().partition("@")[0] in offer.spec.names for offer in offers):
        return _best(asked, offers, request, registry, strategy)
    choice = choice_of_offer(registry.only(offers, asked), f"accelerator={asked!r} was asked for")
    return choice, _required(choice)


def _without_accelerator(asked: Any, request: Request, registry: Registry) -> tuple[Choice, Inventory]:
    if not is_name(asked) or asked.strip().lower() not in (AUTO, REFERENCE_ACCELERATOR):
        raise DevicesError(
            f"devices={request.devices!r} means one process on the CPU, but accelerator={asked!r} was asked for. "
            "Leave out one of them; devices='auto' takes what there is."
        )
    choice = choice_of_offer(
        registry.one(AcceleratorSpec.kind, f"{REFERENCE_ACCELERATOR}@{OWN_DISTRIBUTION}"),
        f"devices={request.devices!r} means one process on the CPU",
    )
    return choice, probe(choice.spec)


def _required(choice: Choice) -> Inventory:
    check_usable(choice)
    inventory = probe(choice.spec)
    if not inventory.available:
        raise DevicesError(
            f"accelerator={choice.name!r} was asked for, but there is no such device here"
            f"{': ' + inventory.note if inventory.note else ''}. Use accelerator='auto' to take what there is."
        )
    return inventory


def _best(
    asked: str, offers: list[Offer], request: Request, registry: Registry, strategy: StrategySpec | None
) -> tuple[Choice, Inventory]:
    """The available accelerator of the highest priority. Those of lower priority are spared their probe."""
    hidden = [str(problem) for problem in registry.problems if problem.hides_accelerators]
    lost: list[tuple[str, str]] = []
    best: Probed | None = None
    for offer in sorted(offers, key=_best_first):
        if best is not None and _priority(offer) < _priority(best.offer):
            lost.append((offer.spec.name, "has a lower priority"))
            continue
        candidate = probed(offer)
        if candidate.broken is not None:
            hidden.append(f"{offer.full_name} ({candidate.broken})")
        reason = _why_not(candidate, strategy, asked)
        if reason:
            lost.append((offer.spec.name, reason))
        elif best is not None:
            raise undecided(f"accelerator={asked!r}", [best.offer, offer])
        else:
            best = candidate
    if best is None:
        raise _nothing_there(asked, lost, hidden)
    if hidden and request.environ.get(FALLBACK) != "1":
        raise _silent_fallback(asked, best, hidden)
    note = f" ({best.inventory.note})" if best.inventory.note else ""
    choice = choice_of_offer(best.offer, f"{asked}: the best that is available{note}", tuple(lost))
    return choice, best.inventory


def probed(offer: Offer) -> Probed:
    """What the probe of an offer answers; that it fails is an answer too."""
    try:
        missing = missing_requirements(offer.spec)
        return Probed(offer, Inventory(note=f"needs {listing(missing)}") if missing else probe(offer.spec))
    except FabricError as error:
        return Probed(offer, Inventory(note=str(error)), broken=error)


def _why_not(candidate: Probed, strategy: StrategySpec | None, asked: str) -> str:
    if not candidate.inventory.available:
        return candidate.inventory.note or "not there"
    if candidate.inventory.only_by_name and asked == AUTO:
        return f"has to be asked for by name ({candidate.inventory.note})"
    if strategy is not None and overlap(strategy.rejects, cast(AcceleratorSpec, candidate.offer.spec)):
        return f"the strategy {strategy.name!r} cannot work with it"
    return ""


def _nothing_there(asked: str, lost: list[tuple[str, str]], hidden: list[str]) -> FabricError:
    if hidden:
        return BrokenPluginError(
            f"accelerator={asked!r} was asked for, but what may offer it is broken: {listing(hidden)}. "
            "Repair or uninstall it, or ask for another accelerator."
        )
    looked = listing(f"{name} ({why})" for name, why in lost)
    return DevicesError(
        f"accelerator={asked!r} was asked for, but no such device is here: {looked}. "
        "Use accelerator='auto' to take what there is."
    )


def _silent_fallback(asked: str, chosen: Probed, hidden: list[str]) -> BrokenPluginError:
    return BrokenPluginError(
        f"accelerator={asked!r} would fall back to {chosen.offer.spec.name!r}, but an installed plugin that may offer "
        f"better hardware is broken: {listing(hidden)}. Repair or uninstall it, block it with FABRIC_PLUGINS_DENY, "
        f"name the accelerator explicitly, or allow the fallback with {FALLBACK}=1."
    )


def choose_environment(
    asked: Any, registry: Registry, environ: Mapping[str, str]
) -> tuple[Choice, Detection | None, list[str]]:
    """The cluster environment, what it tells of the job (``None`` when it detected nothing), and warnings.

    A detection that fails does not stop the others; but the user hears of it, since this process may now take itself
    for the only one of a job that has many.
    """
    if asked is not None:
        choice = asked_choice(ClusterEnvironmentSpec.kind, asked, registry)
        check_usable(choice)
        return choice, detection(choice.spec, environ), []
    detected: list[tuple[Offer, Detection]] = []
    failed: list[tuple[str, str]] = []
    for offer in sorted(registry.offers(ClusterEnvironmentSpec.kind), key=_best_first):
        try:
            found = detection(offer.spec, environ)
        except FabricError as error:
            failed.append((offer.spec.name, str(error)))
        else:
            detected += [(offer, found)] if found is not None else []
    warnings = [f"{sentence}. It is taken as: not there." for _, sentence in failed]
    if not detected:
        offer = registry.one(ClusterEnvironmentSpec.kind, REFERENCE_ENVIRONMENT)
        return choice_of_offer(offer, "no cluster environment was detected", tuple(failed)), None, warnings
    (offer, found), *others = detected
    rivals = [rival for rival, _ in others if _priority(rival) == _priority(offer)]
    if rivals:
        raise undecided("The cluster environment", [offer, *rivals])
    lost = [(o.spec.name, f"detected too ({f.note}), with a lower priority") for o, f in others]
    return choice_of_offer(offer, f"detected: {found.note}", (*lost, *failed)), found, warnings


def _best_first(offer: Offer) -> tuple[int, str]:
    return -_priority(offer), offer.spec.name


def _priority(offer: Offer) -> int:
    spec: Any = offer.spec
    return int(spec.priority)
